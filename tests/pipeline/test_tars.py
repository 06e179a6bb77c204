import gzip
import io
import itertools
import logging
import pickle
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from webdataset import TarWriter

from pipeline.decode import MAX_BYTES
from pipeline.errors import DataError, StoreError, UsageError
from pipeline.samples import RawSample
from pipeline.shards import ShardWriter, sample_key
from pipeline.store import open_store
from pipeline.tars import TarStream, expand_tars, names_tars, shuffled
from pipeline.telemetry import Telemetry


def write_tar(path: Path, names: dict[str, bytes]) -> str:
    """A tar as anybody's: by tarfile, members as they are given."""
    with tarfile.open(path, "w") as tar:
        for name, body in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return str(path)


def write_tars(folder: Path, count: int, per_tar: int = 6) -> dict[str, list[bytes]]:
    """Tars of webdataset's own writer; the bodies of each."""
    found = {}
    for number in range(count):
        url = str(folder / f"{number:03d}.tar")
        bodies = [f"image {number} {n}".encode() * 40 for n in range(per_tar)]
        with TarWriter(url) as writer:
            for n, body in enumerate(bodies):
                writer.write({"__key__": f"{n:06d}", "jpg": body, "cls": n, "json": {"n": n}})
        found[url] = bodies
    return found


def stream_of(urls: list[str], **arguments) -> tuple[TarStream, Telemetry]:
    telemetry = Telemetry()
    settings = {"seed": 1, "shuffle_samples": 10} | arguments
    return TarStream(urls, telemetry=telemetry, **settings), telemetry


def take(stream: TarStream, count: int, epoch: int = 0, step: int = 0) -> list[bytes]:
    samples = stream.samples(epoch, step)
    try:
        return [sample.data for sample in itertools.islice(samples, count)]
    finally:
        samples.close()


# ----------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize(
    ("dataset", "is_stream"),
    [
        ("s3://bucket/train-{000..123}.tar", True),
        ("/data/one.tar", True),
        ("https://example.org/a.tar.gz", True),
        ("s3://bucket/prefix", False),
        ("/data/tars", False),
    ],
)
def test_tars_are_known_by_their_names(dataset, is_stream):
    assert names_tars(dataset) is is_stream


def test_braces_and_lists_are_expanded():
    assert expand_tars("s3://b/{00..02}.tar::/d/{x,y}.tgz") == [
        "s3://b/00.tar", "s3://b/01.tar", "s3://b/02.tar", "/d/x.tgz", "/d/y.tgz",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("pipe:curl https://example.org/{0..9}.tar", "commands are not run"),
        ("s3://b/{0..9}.tar:: pipe:touch /tmp/owned.tar", "commands are not run"),
        ("s3://b/{0..9.tar", "cannot be expanded"),
        ("s3://b/${NOWHERE}/{0..9}.tar", "cannot be expanded.*NOWHERE"),
        ("s3://b/{images,captions}", "'s3://b/images' is no tar"),
        ("s3://key:secret@b/{0..9}.tar", "must not hold credentials"),
    ],
)
def test_what_cannot_be_streamed_is_refused(dataset, words):
    with pytest.raises(UsageError, match=words):
        expand_tars(dataset)


def test_every_rank_needs_a_tar(tmp_path):
    with pytest.raises(UsageError, match="names 1 tars for 2 ranks"):
        stream_of([str(tmp_path / "a.tar")], world_size=2)


# ----------------------------------------------------------------------------------------
# what comes


def test_a_pass_brings_every_image_of_a_rank_once_and_the_next_in_another_order(tmp_path):
    written = write_tars(tmp_path, 4)
    everything = sorted(body for bodies in written.values() for body in bodies)
    stream, telemetry = stream_of(list(written))
    bodies = take(stream, 48)
    assert sorted(bodies[:24]) == sorted(bodies[24:]) == everything
    assert bodies[:24] != bodies[24:]
    assert telemetry.total("fetch_bytes") >= sum(map(len, bodies))
    ranks = [take(stream_of(list(written), rank=rank, world_size=2)[0], 12) for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == everything


def test_a_run_that_begins_elsewhere_sees_another_order(tmp_path):
    stream, _ = stream_of(list(write_tars(tmp_path, 6)))
    assert take(stream, 36) == take(stream, 36)
    assert take(stream, 36) != take(stream, 36, step=1)
    assert take(stream, 36) != take(stream, 36, epoch=1)


def test_our_own_shards_on_a_real_store(s3_url):
    store = open_store(s3_url)
    bodies = [bytes([n]) * (600 * n) for n in range(1, 9)]
    for tar in range(2):
        with store.writer(f"{tar:02d}.tar") as output:
            shard = ShardWriter(output)
            for n in range(4):
                shard.add(sample_key("0123456789", n), "jpg", bodies[4 * tar + n])
            shard.finish()
    stream, telemetry = stream_of(expand_tars(f"{s3_url}/{{00..01}}.tar"))
    assert sorted(take(stream, 8)) == sorted(bodies)
    assert not telemetry.total("lost_tars")


def test_gzipped_tars(tmp_path):
    url = write_tar(tmp_path / "a.tar", {"a.png": b"x" * 900, "b.webp": b"y"})
    Path(f"{url}.gz").write_bytes(gzip.compress(Path(url).read_bytes()))
    stream, telemetry = stream_of([f"{url}.gz"])
    assert sorted(take(stream, 2)) == [b"x" * 900, b"y"]
    assert not telemetry.total("lost_tars")


def test_numbers_tell_images_apart_and_are_left_out_on_request(tmp_path):
    stream, _ = stream_of(list(write_tars(tmp_path, 2)))
    samples = list(itertools.islice(stream.samples(0, 0), 12))
    numbers = {sample.number for sample in samples}
    assert len(numbers) == 12
    assert max(numbers) < 2**63
    without = {sample.number for sample in samples[:11]}
    left = list(itertools.islice(stream.samples(0, 0, is_known=without.__contains__), 2))
    assert [sample.key for sample in left] == [samples[11].key] * 2


class Owned:
    """What a pickle may do to who unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path):
    pickled = pickle.dumps(Owned(tmp_path / "owned"))
    url = write_tar(tmp_path / "a.tar", {"a.pyd": pickled, "a.jpg": b"image", "a.pickle": pickled})
    assert take(stream_of([url])[0], 1) == [b"image"]
    assert not (tmp_path / "owned").exists()


def numbered(sizes: list[int], taken: list[int]):
    """Samples of some sizes; `taken` grows by the size of each that was asked for."""
    for number, size in enumerate(sizes):
        taken.append(size)
        yield RawSample(number, f"{number}", "", bytes(size), None)


@pytest.mark.parametrize(
    ("num_samples", "budget_bytes", "most_held"),
    [(20, 10**9, 20), (50, 10_000, 10), (1, 10**9, 1), (50, 1, 0)],
)
def test_the_buffer_is_bounded_by_number_and_bytes(num_samples, budget_bytes, most_held):
    sizes, taken, given = [1000] * 200, [], []
    buffer = shuffled(
        numbered(sizes, taken),
        random.Random(1),
        num_samples=num_samples,
        budget_bytes=budget_bytes,
    )
    held = []
    for sample in buffer:
        given.append(sample.number)
        held.append(len(taken) - len(given))
    assert max(held) == most_held
    assert sorted(given) == list(range(200))
    assert (given == sorted(given)) is (most_held == 0)


def test_an_image_larger_than_the_buffer_passes_it(tmp_path):
    bodies = [b"%d" % n * (3000 if n == 4 else 10) for n in range(9)]
    url = write_tar(tmp_path / "a.tar", {f"{n}.jpg": body for n, body in enumerate(bodies)})
    assert sorted(take(stream_of([url], budget_bytes=1000)[0], 9)) == sorted(bodies)


def test_a_closed_stream_reads_no_more(tmp_path):
    url = write_tar(tmp_path / "a.tar", {f"{n}.jpg": b"image" * 20_000 for n in range(20)})
    stream, telemetry = stream_of([url], shuffle_samples=1)
    samples = stream.samples(0, 0)
    next(samples)
    stream.close()
    stream.close()
    read_bytes = telemetry.total("fetch_bytes")
    with pytest.raises(StoreError, match=r"a\.tar was ended"):
        list(samples)
    assert telemetry.total("fetch_bytes") == read_bytes
    stream.close()
    assert len(take(stream, 20)) == 20


def test_beginning_anew_ends_what_had_begun(tmp_path):
    url = write_tar(tmp_path / "a.tar", {f"{n}.jpg": b"image" * 20_000 for n in range(20)})
    stream, _ = stream_of([url], shuffle_samples=1)
    earlier = stream.samples(0, 0)
    next(earlier)
    assert len(take(stream, 20)) == 20
    with pytest.raises(StoreError, match="was ended"):
        list(earlier)


# ----------------------------------------------------------------------------------------
# what is lost


def write_claims(path: Path, members: list[tuple[str, bytes, int]]) -> str:
    """A tar of holes: (name, type, size) of members; sizes are as they say. Gzipped by its name."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        for name, kind, size in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, size
            file.write(info.tobuf())
            for _ in range(-(-size // 2**20)):
                file.write(bytes(2**20))
        file.write(bytes(1024))
    return str(path)


def held_while_taking(stream: TarStream, count: int) -> tuple[int, list[int]]:
    """The most bytes of memory meanwhile, and the size of each image."""
    tracemalloc.start()
    try:
        sizes = [len(body) for body in take(stream, count)]
        return tracemalloc.get_traced_memory()[1], sizes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_members_that_are_too_large_are_passed_over_and_told(tmp_path, caplog, ending):
    large, small, regular = MAX_BYTES + 2**20, 2**20, tarfile.REGTYPE
    members = [("0.jpg", small), ("1.jpg", large), ("2.JPG", small), ("2.json", large)]
    url = write_claims(tmp_path / f"a.{ending}", [(name, regular, n) for name, n in members])
    stream, telemetry = stream_of([url])
    held_bytes, sizes = held_while_taking(stream, 2)
    assert sizes == [small, small]
    assert held_bytes < MAX_BYTES // 2
    assert telemetry.total("lost_members") == 1
    assert not telemetry.total("lost_tars")
    assert f"1.jpg of {url} has {large} bytes" in caplog.text


def test_images_that_are_too_large_together_are_told(tmp_path):
    """As one sample is all that has a name up to the first dot."""
    members = [(f"a.{n}.jpg", tarfile.REGTYPE, MAX_BYTES // 4) for n in range(12)]
    stream, telemetry = stream_of([write_claims(tmp_path / "a.tar", members)])
    held_bytes, sizes = held_while_taking(stream, 1)
    assert sizes == [MAX_BYTES // 4]
    assert held_bytes < 2 * MAX_BYTES
    assert telemetry.total("lost_members") == 8 + 3  # not read; read and not used


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_does_not_fit_ends_its_tar(tmp_path, caplog, kind):
    members = [("0.jpg", tarfile.REGTYPE, 2**20), ("header", kind, 2**26)]
    url = write_claims(tmp_path / "a.tar", members)
    stream, telemetry = stream_of([url], shuffle_samples=1)
    held_bytes, sizes = held_while_taking(stream, 2)
    assert sizes == [2**20] * 2
    assert held_bytes < 2**24
    assert telemetry.total("lost_tars") == 1
    assert f"{url} is lost: a header of {2**26} bytes at byte {2**20 + 512}" in caplog.text


def test_a_cut_tar_is_never_lost_silently(tmp_path, caplog):
    """At every half block; webdataset tells of cuts inside a body only."""
    whole = write_tar(tmp_path / "whole.tar", {f"{n}.jpg": b"%d" % n * 700 for n in range(3)})
    body = Path(whole).read_bytes()
    good = write_tar(tmp_path / "good.tar", {"0.jpg": b"good"})
    end = 3 * (512 + 1024)
    for length in range(0, end + 1, 256):
        cut = tmp_path / f"{length}.tar"
        cut.write_bytes(body[:length])
        stream, telemetry = stream_of([str(cut), good])
        caplog.clear()
        found = take(stream, 8)
        assert b"good" in found
        assert set(found) <= {b"good", *(b"%d" % n * 700 for n in range(3))}
        assert telemetry.total("lost_tars") == 1
        assert [r.getMessage().count(str(cut)) for r in caplog.records] == [1]


def test_a_damaged_header_is_never_lost_silently(tmp_path, caplog):
    url = write_tar(tmp_path / "a.tar", {f"{n}.jpg": b"%d" % n * 700 for n in range(3)})
    body = bytearray(Path(url).read_bytes())
    for header in (0, 1536, 3072):
        damaged = body.copy()
        damaged[header + 3] ^= 1
        (tmp_path / "b.tar").write_bytes(damaged)
        stream, telemetry = stream_of([url, str(tmp_path / "b.tar")])
        assert len(set(take(stream, 12))) == 3
        assert telemetry.total("lost_tars") == 1
        assert f"{tmp_path}/b.tar" in caplog.text


def test_a_missing_tar_and_a_cut_gzip_are_told(tmp_path, caplog):
    url = write_tar(tmp_path / "a.tar", {"0.jpg": b"good"})
    squeezed = gzip.compress(Path(url).read_bytes())
    (tmp_path / "b.tar.gz").write_bytes(squeezed[: len(squeezed) // 2])
    stream, telemetry = stream_of([url, str(tmp_path / "b.tar.gz"), str(tmp_path / "c.tar")])
    assert take(stream, 3) == [b"good"] * 3
    assert telemetry.total("lost_tars") == 2
    assert "c.tar is lost: there is no such file" in caplog.text


def test_the_last_sample_of_a_lost_tar_does_not_run_into_the_next(tmp_path):
    """Both have a sample 0; members of the two must not become one."""
    urls = []
    for number in range(6):
        url = write_tar(tmp_path / f"{number}.tar", {"0.cls": b"0", "0.jpg": b"%d" % number})
        body = Path(url).read_bytes()
        Path(url).write_bytes(body[:2048])  # no end
        urls.append(url)
    stream, telemetry = stream_of(urls)
    assert sorted(take(stream, 6)) == [b"%d" % n for n in range(6)]
    assert telemetry.total("lost_tars") == 6
    assert not telemetry.total("lost_members")


def test_images_that_webdataset_merges_are_told(tmp_path, caplog):
    names = {"a.1.jpg": b"first", "a.2.jpg": b"second", "b.txt": b"words", "c.png": b"third"}
    names |= {"d.mask.png": b"mask", "d.jpg": b"fourth"}
    stream, telemetry = stream_of([write_tar(tmp_path / "a.tar", names)])
    assert sorted(take(stream, 3)) == [b"first", b"fourth", b"third"]
    assert telemetry.total("lost_members") == 2
    assert telemetry.total("samples_without_image") == 1
    assert "1.jpg, 2.jpg" in caplog.text


def test_a_name_that_comes_twice_is_told(tmp_path, caplog):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for body in (b"first", b"second"):
            info = tarfile.TarInfo("a.jpg")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    stream, telemetry = stream_of([str(path)])
    assert take(stream, 1) == [b"first"]
    assert telemetry.total("lost_members") == 1
    assert "a.jpg" in caplog.text


def test_long_names_links_and_folders_are_followed(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            folder = tarfile.TarInfo("folder")
            folder.type, folder.size = tarfile.DIRTYPE, 0
            tar.addfile(folder)
            link = tarfile.TarInfo("folder/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "ä" * 120
            tar.addfile(link)
            info = tarfile.TarInfo("folder/" + "ü" * 200 + ".jpg")
            info.size = 1000
            tar.addfile(info, io.BytesIO(b"i" * 1000))
        stream, telemetry = stream_of([str(path)])
        assert take(stream, 2) == [b"i" * 1000] * 2
        assert not telemetry.total("lost_tars")
    assert not caplog.records


def test_where_nothing_is_the_stream_ends_and_names_a_few(tmp_path, caplog):
    stream, telemetry = stream_of(expand_tars(f"{tmp_path}/{{000..099}}.tar"))
    with pytest.raises(DataError, match="no image can be used in any tar"):
        take(stream, 1)
    assert telemetry.total("lost_tars") == 100
    assert len(caplog.records) == 21


def test_tars_without_any_image_end_the_stream(tmp_path):
    stream, _ = stream_of([write_tar(tmp_path / "a.tar", {"a.txt": b"words"})])
    with pytest.raises(DataError, match="no image can be used in any tar of this rank"):
        take(stream, 1)
