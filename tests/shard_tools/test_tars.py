"""Tars as they come: every dialect read, every image once, and nothing lost without a word."""

import dataclasses
import gzip
import io
import json
import subprocess
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ObjectChangedError, ObjectMissingError, SampleError
from pipeline.shards import BLOCK_BYTES, END_OF_ARCHIVE, ShardWriter, member_header
from pipeline.store import PART_BYTES, SourceFile, Store, find_file, open_store
from shard_tools.members import DAMAGED_TAR, MAX_MEMBERS, TarWalk
from shard_tools.tars import (
    MAX_GROUP_MEMBERS,
    MAX_SIDECAR_BYTES,
    NOT_A_FILE,
    TarInput,
    read_tar,
    read_tar_file,
    tar_spans,
)

DIALECTS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
CAP = 2**20

Files = Sequence[tuple[str, bytes]]
Put = Callable[..., SourceFile]


def make_tar(files: Files, dialect: int = tarfile.USTAR_FORMAT) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=dialect) as tar:
        for name, body in files:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return output.getvalue()


def inputs_of(tar: bytes, *, max_bytes: int = CAP) -> list[TarInput]:
    return list(read_tar(io.BytesIO(tar), where="x.tar", max_bytes=max_bytes))


def images_of(tar: bytes) -> list[tuple[str, bytes | None]]:
    return [(item.name, item.data) for item in inputs_of(tar)]


def reasons_of(items: Sequence[TarInput]) -> list[str | None]:
    return [item.problem.reason if item.problem else None for item in items]


def store_tar(store: Store, body: bytes, name: str = "x.tar") -> SourceFile:
    with store.writer(name) as writer:
        writer.write(body)
    file = find_file(store.url_of(name))
    assert file is not None
    return file


@pytest.fixture(params=["file", "s3", "memory"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Put]:
    """A function that puts a tar on some store and describes it as a listing would."""
    if request.param == "memory":
        memory = fsspec.filesystem("memory")

        def put(body: bytes, name: str = "x.tar") -> SourceFile:
            memory.pipe(f"/tars/{name}", body)
            file = find_file(f"memory://tars/{name}")
            assert file is not None
            return file

        yield put
        memory.rm("/tars", recursive=True)
        return
    url = request.getfixturevalue("s3_url") if request.param == "s3" else f"file://{tmp_path}/t"
    yield lambda body, name="x.tar": store_tar(open_store(url), body, name)


# ----------------------------------------------------------------------------------------
# dialects


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect(dialect: int) -> None:
    files = [("a/1.jpg", b"one"), ("a/2.jpg", b""), ("b/é.jpg", bytes(range(256)) * 3)]
    assert images_of(make_tar(files, dialect)) == files


@pytest.mark.parametrize("dialect", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(dialect: int) -> None:
    files = [(f"{'folder/' * 40}{n}.jpg", b"%d" % n) for n in range(3)]
    tar = make_tar(files, dialect)
    assert images_of(tar) == files
    for item in inputs_of(tar):
        assert tar[item.offset - BLOCK_BYTES : item.offset] == item.header
        assert tar[item.offset : item.offset + item.size_bytes] == item.data


def test_a_name_in_two_parts() -> None:
    name = f"{'f' * 120}/{'n' * 80}.jpg"
    assert images_of(make_tar([(name, b"x")], tarfile.USTAR_FORMAT)) == [(name, b"x")]


@pytest.mark.parametrize("format_option", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_the_tar_command_writes(tmp_path: Path, format_option: str) -> None:
    (tmp_path / "in/cat").mkdir(parents=True)
    (tmp_path / "in/cat/1.jpg").write_bytes(b"one")
    (tmp_path / "in/cat/2.jpg").symlink_to("1.jpg")
    with (tmp_path / "in/cat/3.jpg").open("wb") as sparse:
        sparse.truncate(10 * 2**20)
        sparse.seek(5 * 2**20)
        sparse.write(b"x")
    (tmp_path / "in/cat/4.jpg").write_bytes(b"four")
    options = ["--sort=name", f"--format={format_option}"]
    options += [] if format_option in ("v7", "ustar") else ["--sparse"]
    subprocess.run(["tar", *options, "-cf", "x.tar", "-C", "in", "cat"], cwd=tmp_path, check=True)
    found = {
        item.name.rpartition("/")[2]: item for item in inputs_of((tmp_path / "x.tar").read_bytes())
    }
    whole = {name: item for name, item in found.items() if item.data is not None}
    assert {name: item.data for name, item in whole.items()} == {"1.jpg": b"one", "4.jpg": b"four"}
    assert reasons_of([item for item in found.values() if item.data is None]) == [
        NOT_A_FILE,
        NOT_A_FILE if "--sparse" in options else "too large",
    ]
    assert {item.columns["label"] for item in whole.values()} == {"cat"}


def test_a_size_in_base_256() -> None:
    header = bytearray(member_header("1.jpg", 3))
    header[124:136] = b"\x80" + (3).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    tar = bytes(header) + b"abc".ljust(BLOCK_BYTES, b"\0") + END_OF_ARCHIVE
    assert images_of(tar) == [("1.jpg", b"abc")]


def test_names_that_are_not_utf8() -> None:
    output = io.BytesIO()
    with tarfile.open(
        fileobj=output, mode="w", format=tarfile.USTAR_FORMAT, encoding="latin-1"
    ) as tar:
        for name in ("é.jpg", "è.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    assert [item.name for item in inputs_of(output.getvalue())] == ["\\xe9.jpg", "\\xe8.jpg"]


def test_our_own_shards() -> None:
    output = io.BytesIO()
    shard = ShardWriter(output)
    entries = [shard.add(f"{n:08d}", "jpg", bytes([n]) * n * 100) for n in range(9)]
    shard.finish()
    found = inputs_of(output.getvalue())
    assert [(i.offset, i.size_bytes) for i in found] == [(e.offset, e.length) for e in entries]


# ----------------------------------------------------------------------------------------
# samples


def test_sidecars_become_columns() -> None:
    secret = "https://me:hush@host/1.jpg?token=hush"
    document = json.dumps({"url": secret, "width": 3})
    files = [
        ("0001.jpg", b"image"),
        ("0001.cls", b"17\n"),
        ("0001.txt", "a café".encode()),
        ("0001.json", document.encode()),
        ("0001.npy", b"\x93NUMPY"),
        ("0002.json", b'{"a": 1}'),
        ("0002.png", b"other"),
        ("0003.jpg", b"third"),
    ]
    first, second, third = inputs_of(make_tar(files))
    assert (first.data, second.data, third.data) == (b"image", b"other", b"third")
    assert first.columns == {
        "label": "17",
        "txt": "a café",
        "json": json.dumps({"url": "https://host/1.jpg", "width": 3}),
        "url": "https://host/1.jpg",
    }
    assert second.columns == {"json": '{"a": 1}'}
    assert third.columns == {}


@pytest.mark.parametrize(
    "body", [b"\xff\xfe", b'{"a": "' + b"x" * MAX_SIDECAR_BYTES + b'"}', b"", b" \n"]
)
def test_sidecars_that_are_no_text(body: bytes) -> None:
    [item] = inputs_of(make_tar([("1.jpg", b"x"), ("1.txt", body)]))
    assert (item.data, item.columns) == (b"x", {})


@pytest.mark.parametrize("body", [b"[" * 60_000, b'{"url": "http://h/\\ud800"}', b"{", b"9" * 5000])
def test_hostile_json(body: bytes) -> None:
    [item] = inputs_of(make_tar([("1.jpg", b"x"), ("1.json", body)]))
    assert item.data == b"x"
    assert item.columns["json"] == body.decode()
    assert all(text.encode() for text in item.columns.values())


def test_the_label_is_the_first_folder() -> None:
    names = ["cat/a/1.jpg", "./dog/2.jpg", "3.jpg", "/top/4.jpg"]
    found = inputs_of(make_tar([(name, b"x") for name in names]))
    assert [item.columns.get("label") for item in found] == ["cat", "dog", None, "top"]


def test_dotted_names_do_not_merge() -> None:
    files = [("photo.1.jpg", b"1"), ("photo.1.txt", b"one"), ("photo.2.jpg", b"2")]
    files += [("photo.2.txt", b"two"), ("photo.json", b"{}")]
    found = inputs_of(make_tar(files))
    assert [(i.data, i.columns["txt"], i.columns["json"]) for i in found] == [
        (b"1", "one", "{}"),
        (b"2", "two", "{}"),
    ]


def test_any_number_of_files_of_one_key() -> None:
    files = [(f"photo.{n}.jpg", b"%d" % n) for n in range(3 * MAX_GROUP_MEMBERS + 1)]
    assert images_of(make_tar(files)) == files


def test_same_names_in_different_folders() -> None:
    files = [("a/1.jpg", b"a"), ("b/1.jpg", b"b"), ("b/1.txt", b"text")]
    assert [(i.data, i.columns.get("txt")) for i in inputs_of(make_tar(files))] == [
        (b"a", None),
        (b"b", "text"),
    ]


def test_sidecars_alone_are_one_reject() -> None:
    found = inputs_of(make_tar([("1.jpg", b"x"), ("2.txt", b"text"), ("2.json", b"{}")]))
    assert reasons_of(found) == [None, "not an image"]
    assert found[1].name == "2.txt"


def test_too_large_for_memory() -> None:
    found = inputs_of(make_tar([("1.jpg", bytes(2000)), ("2.jpg", b"x")]), max_bytes=1999)
    assert reasons_of(found) == ["too large", None]
    assert found[0].data is None
    assert found[0].size_bytes == 2000


# ----------------------------------------------------------------------------------------
# damage

WHOLE = make_tar([(f"{n:04d}.{ext}", b"%d" % n * 300) for n in range(5) for ext in ("jpg", "txt")])
LAST_BODY_END = len(WHOLE.rstrip(b"\0"))


def test_every_cut_shows() -> None:
    """At every boundary of a block, where other readers lose the rest silently, and inside."""
    for block in range(0, len(WHOLE) // BLOCK_BYTES):
        for cut in (block * BLOCK_BYTES, block * BLOCK_BYTES + 100):
            found = inputs_of(WHOLE[:cut])
            complete = cut > -(-LAST_BODY_END // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES - 1
            assert (reasons_of(found)[-1:] != ["truncated"]) == complete, cut
            if not complete:
                assert found[-1].problem is not None
                assert f"ends at byte {cut}" in str(found[-1].problem)


def test_what_was_whole_before_a_cut_is_kept() -> None:
    found = inputs_of(WHOLE[: 8 * BLOCK_BYTES])
    assert [item.data for item in found] == [b"0" * 300, b"1" * 300, None]
    assert found[1].columns == {"txt": "1" * 300}


@pytest.mark.parametrize("position", [0, 100, 124, 148, 156 + 1, 300])
def test_a_damaged_header_shows(position: int) -> None:
    broken = bytearray(WHOLE)
    broken[8 * BLOCK_BYTES + position] ^= 0x11
    found = inputs_of(bytes(broken))
    assert reasons_of(found) == [None, None, DAMAGED_TAR]
    assert f"at byte {8 * BLOCK_BYTES}" in str(found[-1].problem)


@given(st.integers(0, LAST_BODY_END - 1), st.integers(1, 255))
def test_no_flipped_byte_loses_inputs_silently(position: int, flip: int) -> None:
    broken = bytearray(WHOLE)
    broken[position] ^= flip
    found = inputs_of(bytes(broken))
    assert len(found) >= 5 or found[-1].problem is not None


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"", None),
        (bytes(7777), None),
        (WHOLE, DAMAGED_TAR),
        (bytes(10_000) + b"x", DAMAGED_TAR),
    ],
)
def test_behind_the_end(tail: bytes, reason: str | None) -> None:
    found = inputs_of(WHOLE + tail)
    assert reasons_of(found)[:5] == [None] * 5
    assert reasons_of(found)[5:] == ([reason] if reason else [])


@pytest.mark.parametrize("body", [b"no tar at all" * 100, gzip.compress(WHOLE, mtime=0), b""])
def test_no_tar(body: bytes) -> None:
    [item] = inputs_of(body)
    assert item.data is None
    assert isinstance(item.problem, SampleError)


@pytest.mark.parametrize(
    "record", [b"5 path=x\n", b"12 path=x\n", b"x", b"11 size=-1\n", b"9999999 a=b\n"]
)
def test_a_damaged_extended_header(record: bytes) -> None:
    header = bytearray(member_header("pax", len(record)))
    header[156:157] = b"x"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    found = inputs_of(bytes(header) + record.ljust(BLOCK_BYTES, b"\0") + WHOLE)
    assert reasons_of(found) == [DAMAGED_TAR]


def test_more_members_than_memory_holds() -> None:
    """A gzipped tar of a few megabytes may have any number."""
    walk = TarWalk(io.BytesIO(WHOLE), "x.tar", 0, None, max_members=3)
    members = iter(walk)
    for name in ("0000.jpg", "0000.txt", "0001.jpg"):
        member = next(members)
        assert member.name == name
        walk.body(member, 0)
    with pytest.raises(SampleError, match=r"damaged tar: x\.tar: more than 3 members"):
        next(members)


@pytest.mark.slow
def test_a_bomb_of_members() -> None:
    members = member_header("1.jpg", 0) * (MAX_MEMBERS + 5) + END_OF_ARCHIVE
    inputs = enumerate(read_tar(io.BytesIO(members), where="x.tar", max_bytes=CAP))
    [(number, last)] = deque(inputs, maxlen=1)
    assert number == MAX_MEMBERS
    assert "more than 1000000 members" in str(last.problem)


# ----------------------------------------------------------------------------------------
# files on stores


def test_any_store(stored: Put) -> None:
    found = list(read_tar_file(stored(WHOLE), max_bytes=CAP))
    assert [item.data for item in found] == [b"%d" % n * 300 for n in range(5)]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.TGZ"])
def test_gzipped(stored: Put, name: str) -> None:
    packed = gzip.compress(WHOLE[:5000]) + gzip.compress(WHOLE[5000:])
    found = list(read_tar_file(stored(packed, name), max_bytes=CAP))
    assert [item.data for item in found] == [b"%d" % n * 300 for n in range(5)]


@pytest.mark.parametrize("cut", [5, 100, 200])
def test_a_gzipped_tar_that_is_cut(tmp_path: Path, cut: int) -> None:
    packed = gzip.compress(WHOLE)
    assert len(packed) > cut
    file = store_tar(open_store(tmp_path), packed[:cut], "x.tgz")
    assert reasons_of(list(read_tar_file(file, max_bytes=CAP)))[-1] == "truncated"


def test_a_gzipped_tar_that_is_damaged(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(WHOLE))
    packed[-6] ^= 1  # in the checksum
    file = store_tar(open_store(tmp_path), bytes(packed), "x.tgz")
    assert reasons_of(list(read_tar_file(file, max_bytes=CAP)))[-1] == DAMAGED_TAR


def test_another_file_by_now(stored: Put) -> None:
    before = stored(WHOLE)
    stored(make_tar([("1.jpg", b"x")]))
    with pytest.raises(ObjectChangedError, match=r"x\.tar.* put the old file back"):
        list(read_tar_file(before, max_bytes=CAP))


def test_a_tar_that_is_gone(stored: Put) -> None:
    gone = dataclasses.replace(stored(WHOLE), url=f"{stored(WHOLE).url}-gone")
    with pytest.raises(ObjectMissingError, match=r"x\.tar-gone is gone"):
        list(read_tar_file(gone, max_bytes=CAP))


def test_changed_while_it_is_read(stored: Put) -> None:
    reading = read_tar_file(
        stored(make_tar([(f"{n}.jpg", bytes(1000)) for n in range(9)])), max_bytes=CAP
    )
    next(reading)
    stored(make_tar([(f"{n}.jpg", b"y" * 1000) for n in range(8)]))
    with pytest.raises(ObjectChangedError, match=r"x\.tar"):
        list(reading)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_spans_are_the_whole(stored: Put, dialect: int) -> None:
    files = [
        (f"f/{n:04d}.{ext}", bytes([n]) * (n * 37)) for n in range(60) for ext in ("jpg", "cls")
    ]
    files += [(f"photo.{n}.jpg", bytes(100)) for n in range(2 * MAX_GROUP_MEMBERS)]
    file = stored(make_tar(files, dialect))
    spans = tar_spans(file, 20_000)
    assert len(spans) > 5
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
    pieces = [
        item
        for start, end in spans
        for item in read_tar_file(file, start_bytes=start, end_bytes=end, max_bytes=CAP)
    ]
    assert pieces == list(read_tar_file(file, max_bytes=CAP))
    assert len(pieces) == 60 + 2 * MAX_GROUP_MEMBERS


def test_spans_of_a_damaged_tar(tmp_path: Path) -> None:
    file = store_tar(open_store(tmp_path), WHOLE[: 14 * BLOCK_BYTES])
    spans = tar_spans(file, 2000)
    assert spans[-1][1] == 14 * BLOCK_BYTES
    reasons = [
        reason
        for start, end in spans
        for reason in reasons_of(
            list(read_tar_file(file, start_bytes=start, end_bytes=end, max_bytes=CAP))
        )
    ]
    assert reasons == [None] * 4 + ["truncated"]


def test_long_bodies_are_not_fetched_for_spans(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = bytes(3 * PART_BYTES)
    file = store_tar(open_store(s3_url), make_tar([(f"{n}.jpg", body) for n in range(4)]))
    fetched = []
    get_range = Store.get_range

    def counted(self: Store, key: str, start: int, length: int, **options: str | None) -> bytes:
        fetched.append(length)
        return get_range(self, key, start, length, **options)

    monkeypatch.setattr(Store, "get_range", counted)
    assert len(tar_spans(file, len(body))) == 4
    assert sum(fetched) < 2 * PART_BYTES
