"""Tar shards: any reader opens them, equal samples give equal bytes, no damage goes unseen."""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ShardError
from pipeline.shards import (
    BLOCK_BYTES,
    INDEX_SCHEMA,
    MAX_SAMPLE_BYTES,
    IndexRows,
    ShardWriter,
    crc32c,
    encode_index,
    encode_index_table,
    kept_rows,
    member_header,
    read_index,
    read_members,
    read_samples,
    sample_key,
)

WHERE = "s3://bucket/data/00/shard.tar"
keys = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=20)
samples_strategy = st.lists(
    st.tuples(keys, st.sampled_from(["jpg", "png", "webp"]), st.binary(max_size=3 * BLOCK_BYTES)),
    max_size=8,
)
Samples = Sequence[tuple[str, str, bytes]]


def build(samples: Samples) -> tuple[bytes, pa.Table, bytes]:
    """The shard, its index and its hash."""
    output = io.BytesIO()
    writer = ShardWriter(output)
    rows = []
    for key, extension, data in samples:
        entry = writer.add(key, extension, data)
        columns = {name: getattr(entry, name) for name in ("offset", "length", "crc32c", "sha256")}
        rows.append({"key": key, "source": f"/{key}", "status": "ok", **columns})
    digest = writer.finish()
    assert writer.size_bytes == len(output.getvalue())
    return output.getvalue(), read_index(encode_index(rows), where=WHERE), digest


def read_back(tar: bytes, index: pa.Table, digest: bytes) -> list[tuple[str, bytes]]:
    stream = io.BytesIO(tar)
    samples = read_samples(stream, index, where=WHERE, shard_hash=digest)
    return [(sample.key, sample.data) for sample in samples]


@given(samples_strategy)
def test_round_trip(samples: Samples) -> None:
    tar, index, digest = build(samples)
    assert read_back(tar, index, digest) == [(key, data) for key, _, data in samples]
    assert build(samples)[0] == tar
    for row, (_, _, data) in zip(index.to_pylist(), samples, strict=True):
        assert tar[row["offset"] : row["offset"] + row["length"]] == data
        assert row["crc32c"] == crc32c(data)
        assert row["sha256"] == hashlib.sha256(data).digest()


@given(samples_strategy)
def test_the_standard_library_reads_it(samples: Samples) -> None:
    with tarfile.open(fileobj=io.BytesIO(build(samples)[0]), mode="r:") as archive:
        members = archive.getmembers()
        bodies = [file.read() for m in members if (file := archive.extractfile(m)) is not None]
    assert [m.name for m in members] == [f"{key}.{extension}" for key, extension, _ in samples]
    assert bodies == [data for _, _, data in samples]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
        assert (member.uname, member.gname) == ("cropstream", "cropstream")


@given(name=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=100))
def test_headers_are_those_of_the_standard_library(name: str) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.uname, info.gname = 123456, "cropstream", "cropstream"
    theirs = info.tobuf(tarfile.USTAR_FORMAT)
    ours = member_header(name, 123456)
    # Only the device numbers may differ (zeros or nothing), and with them the checksum.
    assert ours[:148] == theirs[:148]
    assert ours[156:329] == theirs[156:329]


@pytest.mark.parametrize(
    ("name", "size"), [("a" * 101, 0), ("a", MAX_SAMPLE_BYTES + 1), ("é" * 51, 0)]
)
def test_what_does_not_fit_into_a_header(name: str, size: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        member_header(name, size)


@pytest.mark.parametrize("key", ["", "a.b", "a/b"])
def test_keys_that_readers_would_split(key: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        ShardWriter(io.BytesIO()).add(key, "jpg", b"")


def test_keys_have_one_width() -> None:
    first, last = sample_key("0123456789abcdef", 0), sample_key("0123456789abcdef", 10**12 - 1)
    assert (first, last) == ("01234567000000000000", "01234567999999999999")


def test_crc32c_is_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720's polynomial


SAMPLES = [("k0", "jpg", b"a" * 700), ("k1", "png", b"b" * 512), ("k2", "jpg", b"c" * 10)]


@given(st.data())
def test_no_cut_goes_unseen(data: st.DataObject) -> None:
    """Also exactly between two members, where webdataset and tarfile notice nothing."""
    tar, index, digest = build(SAMPLES)
    length = data.draw(st.integers(0, len(tar) - 1))
    with pytest.raises(ShardError, match=WHERE):
        read_back(tar[:length], index, digest)


@given(st.data())
def test_no_flipped_bit_goes_unseen(data: st.DataObject) -> None:
    tar, index, digest = build(SAMPLES)
    position = data.draw(st.integers(0, len(tar) - 1))
    if _is_padding(position):
        return
    damaged = bytearray(tar)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ShardError, match=WHERE):
        read_back(bytes(damaged), index, digest)


def _is_padding(position: int) -> bool:
    """Bytes after a sample up to the next block belong to nobody."""
    begin = 0
    for _, _, data in SAMPLES:
        end = begin + BLOCK_BYTES + len(data)
        if end <= position < end + -len(data) % BLOCK_BYTES:
            return True
        begin = end + -len(data) % BLOCK_BYTES
    return False


def test_a_cut_names_the_place() -> None:
    tar, index, digest = build(SAMPLES)
    with pytest.raises(ShardError, match=r"shard\.tar: cut at byte 600"):
        read_back(tar[:600], index, digest)


def test_a_changed_sample_names_key_offset_and_sums() -> None:
    tar, index, digest = build(SAMPLES)
    damaged = bytearray(tar)
    damaged[512] ^= 1
    with pytest.raises(
        ShardError, match=r"sample k0 at byte 512: CRC32C is 0x\w+, recorded was 0x"
    ):
        read_back(bytes(damaged), index, digest)


def test_a_shard_that_lost_members_but_kept_its_end() -> None:
    tar, _, _ = build(SAMPLES[:2])
    _, index, digest = build(SAMPLES)
    with pytest.raises(ShardError, match="without the last 1 samples, from k2"):
        read_back(tar, index, digest)


def test_a_shard_with_members_that_nobody_lists() -> None:
    tar, _, _ = build(SAMPLES)
    _, index, digest = build(SAMPLES[:2])
    with pytest.raises(ShardError, match=r"'k2\.jpg' at byte 3072 is in no index row"):
        read_back(tar, index, digest)


def test_a_shard_of_another_hash() -> None:
    tar, index, _ = build(SAMPLES)
    with pytest.raises(ShardError, match="the shard's hash is"):
        read_back(tar, index, bytes(32))


def test_members_that_are_no_plain_files() -> None:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with pytest.raises(ShardError, match="no plain file"):
        list(read_members(io.BytesIO(output.getvalue()), where=WHERE))


# ----------------------------------------------------------------------------------------
# indexes

ROWS: list[dict[str, Any]] = [
    {"key": "a", "source": "/a", "status": "ok", "phash": 2**64 - 1, "label": "cat"},
    {"key": "b", "source": "/b", "status": "rejected", "reason": "truncated", "label": None},
    {"key": "c", "source": "/c", "status": "ok", "crc32c": 2**32 - 1, "sha256": bytes(32)},
]


def test_an_index_is_the_same_bytes_and_comes_back() -> None:
    body = encode_index(ROWS, ["label"])
    assert body == encode_index(ROWS, ["label"])
    table = read_index(body, where=WHERE, sha256=hashlib.sha256(body).digest())
    assert table.column_names == [*INDEX_SCHEMA.names, "label"]
    for written, read in zip(ROWS, table.to_pylist(), strict=True):
        assert {name: value for name, value in read.items() if value is not None} == {
            name: value for name, value in written.items() if value is not None
        }


def test_an_empty_index() -> None:
    assert len(read_index(encode_index([]), where=WHERE)) == 0


def test_an_index_that_changed() -> None:
    with pytest.raises(ShardError, match="SHA-256"):
        read_index(encode_index(ROWS), where=WHERE, sha256=bytes(32))


def test_an_index_that_is_none() -> None:
    other = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"]}), other)
    no_text = encode_index(ROWS).replace(b"phash", b"\xff" * 5)
    for body in (b"nothing", encode_index(ROWS)[:-10], other.getvalue(), no_text):
        with pytest.raises(ShardError, match=WHERE):
            read_index(body, where=WHERE)


def test_kept_rows() -> None:
    table = read_index(encode_index(ROWS), where=WHERE)
    assert kept_rows(table, None)["key"].to_pylist() == ["a", "c"]
    assert kept_rows(table, b"\x04")["key"].to_pylist() == ["c"]
    assert kept_rows(table, b"\x02")["key"].to_pylist() == []
    with pytest.raises(ShardError, match="does not fit"):
        kept_rows(table, b"\x04\x00")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_masks_are_numpys_little_endian_bits(rows: list[tuple[bool, bool]]) -> None:
    status = ["ok" if good else "rejected" for good, _ in rows]
    table = read_index(
        encode_index([{"key": str(i), "source": "", "status": s} for i, s in enumerate(status)]),
        where=WHERE,
    )
    mask = np.packbits(np.array([keep for _, keep in rows], bool), bitorder="little").tobytes()
    kept = [str(i) for i, (good, keep) in enumerate(rows) if good and keep]
    assert kept_rows(table, mask)["key"].to_pylist() == kept


def test_rows_that_are_collected_give_the_same_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where columns come and go, and over several settled parts."""
    rows = [
        {"key": str(n), "source": "s", "status": "ok", "crc32c": n, **({f"x{n}": "y"} if n else {})}
        for n in range(7)
    ]
    monkeypatch.setattr("pipeline.shards._FRESH_ROWS", 3)
    collected = IndexRows()
    for row in rows:
        collected.append(row)
    table = collected.table()
    whole = read_index(encode_index(rows, ["label", *(f"x{n}" for n in range(1, 7))]), where=WHERE)
    assert table.to_pylist() == whole.to_pylist()
    assert table.schema.equals(whole.schema)
    assert read_index(encode_index_table(table), where=WHERE).equals(whole)
    assert len(IndexRows().table()) == 0
