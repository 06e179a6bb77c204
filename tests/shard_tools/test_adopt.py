"""Shards that others wrote are read where they lie, by their index, as if we had packed them."""

import gzip
import hashlib
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import UsageError
from pipeline.fetch import RawSample, SampleReader
from pipeline.manifest import SNAPSHOT_SCHEMA, Snapshot, commit_snapshot, read_snapshot
from pipeline.shards import encode_index, encode_index_table, sample_key
from pipeline.store import SourceFile, Store, find_file, open_store
from pipeline.telemetry import Telemetry
from shard_tools.adopt import AdoptedShard, index_tar
from shard_tools.judge import ImageSettings, judge
from shard_tools.tars import COLUMNS
from shard_tools.verify import ShardTask, ShardVerdict, verify_shard
from tests.shard_tools.conftest import shard_tools
from tests.shard_tools.test_tars import make_tar, store_tar

JUDGE = partial(judge, settings=ImageSettings())
KEYS = partial(sample_key, "0123456789abcdef")


@pytest.fixture(scope="module")
def members(images: Path) -> list[tuple[str, bytes]]:
    """Images with captions and classes; some are none, and there is a file that is too much."""
    files: list[tuple[str, bytes]] = []
    for number, path in enumerate(sorted(images.glob("*/*"))[:20]):
        files += [(f"{number:06d}{path.suffix}", path.read_bytes())]
        files += [(f"{number:06d}.txt", f"caption {number}".encode())]
        files += [(f"{number:06d}.cls", str(number % 3).encode())]
    return [*files, ("000098.jpg", b"no image"), ("000099.txt", b"alone")]


def rows_of(shard: AdoptedShard) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = shard.rows.table().to_pylist()
    return rows


def adopt(dataset: Store, file: SourceFile) -> AdoptedShard:
    """Index a tar, and commit a snapshot of it alone."""
    shard = index_tar(file, keys=KEYS, judge=JUDGE)
    body = encode_index_table(shard.rows.table())
    with dataset.writer("data/ab/index.parquet") as writer:
        writer.write(body)
    row = {
        "tar": file.url,
        "index": "data/ab/index.parquet",
        "tar_bytes": file.size_bytes,
        "index_bytes": len(body),
        "tar_tag": shard.tar_tag,
        "tar_hash": shard.tar_hash,
        "index_sha256": hashlib.sha256(body).digest(),
        "rows": len(shard.rows.table()),
        "kept": sum(each["status"] == "ok" for each in rows_of(shard)),
    }
    commit_snapshot(dataset, pa.Table.from_pylist([row], SNAPSHOT_SCHEMA), version=1, attempt="a")
    return shard


def check(dataset: Store, *, quick: bool = False, **changed: Any) -> ShardVerdict:
    [row] = read_snapshot(dataset).table.to_pylist()
    return verify_shard(ShardTask(dataset=dataset.url, quick=quick, **{**row, **changed}))


def read_all(dataset: Store, snapshot: Snapshot) -> list[RawSample]:
    found = SampleReader(dataset, snapshot, Telemetry()).read(0, snapshot.num_kept - 1)
    assert all(isinstance(sample, RawSample) for sample in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_loader_reads_what_was_adopted(
    dataset: str, members: list[tuple[str, bytes]], dialect: int
) -> None:
    long_name = [(f"{'folder/' * 30}{name}", body) for name, body in members]
    tar = make_tar(long_name if dialect != tarfile.USTAR_FORMAT else members, dialect)
    theirs, ours = open_store(f"{dataset}/theirs"), open_store(f"{dataset}/ours")
    file = store_tar(theirs, tar)
    shard = adopt(ours, file)
    images = [(body, str(number % 3)) for number, (_, body) in enumerate(members[:60:3])]
    samples = read_all(ours, read_snapshot(ours))
    assert [(sample.data, sample.label) for sample in samples] == images
    assert [sample.key for sample in samples] == [KEYS(number) for number in range(20)]
    assert theirs.get("x.tar") == tar
    verdict = check(ours)
    assert (verdict.problem, verdict.samples, verdict.decoded) == (None, 20, 4)
    assert [row["reason"] for row in rows_of(shard)[20:]] == ["not an image", "not an image"]
    assert [row["txt"] for row in rows_of(shard)[:20]] == [f"caption {n}" for n in range(20)]
    assert (
        rows_of(shard)[0]["source"] == f"{file.url}#{'folder/' * 30 if dialect else ''}000000.jpg"
    )


def test_verify_through_the_command_line(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    adopt(open_store(tmp_path / "set"), store_tar(open_store(tmp_path), make_tar(members)))
    verified = shard_tools("verify", str(tmp_path / "set"), "--json").json()
    assert (verified["samples"], verified["decoded"]) == (20, 4)
    assert verified["read_by_webdataset"] == 0


def test_the_hash_covers_header_and_samples(
    tmp_path: Path, members: list[tuple[str, bytes]]
) -> None:
    tar = make_tar(members)
    shard = adopt(open_store(tmp_path / "set"), store_tar(open_store(tmp_path), tar))
    expected = hashlib.sha256()
    for row in rows_of(shard):
        if row["status"] == "ok":
            expected.update(tar[row["offset"] - 512 : row["offset"]])
            expected.update(hashlib.sha256(tar[row["offset"] :][: row["length"]]).digest())
    assert shard.tar_hash == expected.digest()


@pytest.mark.parametrize(
    ("place", "words"), [(0, "CRC32C"), (-500, "the shard's hash is"), (-513, None)]
)
def test_verify_finds_what_it_vouches_for(
    tmp_path: Path, members: list[tuple[str, bytes]], place: int, words: str | None
) -> None:
    """A sample, its header, and a byte that is neither."""
    dataset = open_store(tmp_path / "set")
    shard = adopt(dataset, store_tar(open_store(tmp_path), make_tar(members)))
    assert check(dataset).problem is None
    path = tmp_path / "x.tar"
    body = bytearray(path.read_bytes())
    body[rows_of(shard)[5]["offset"] + place] ^= 1
    path.write_bytes(body)
    problem = check(dataset).problem
    assert (problem is None) if words is None else (words in str(problem) and str(path) in problem)


@pytest.mark.parametrize("quick", [True, False])
def test_verify_without_the_tar(
    tmp_path: Path, members: list[tuple[str, bytes]], quick: bool
) -> None:
    dataset = open_store(tmp_path / "set")
    adopt(dataset, store_tar(open_store(tmp_path), make_tar(members)))
    (tmp_path / "x.tar").unlink()
    assert "no such object" in str(check(dataset, quick=quick).problem)


def test_an_overlapping_index_is_refused(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    dataset = open_store(tmp_path / "set")
    shard = adopt(dataset, store_tar(open_store(tmp_path), make_tar(members)))
    body = encode_index([rows_of(shard)[1], rows_of(shard)[0]], COLUMNS)
    (tmp_path / "set/data/ab/index.parquet").write_bytes(body)
    changed = {"index_bytes": len(body), "index_sha256": hashlib.sha256(body).digest()}
    assert "overlaps" in str(check(dataset, **changed, rows=2, kept=2).problem)


def test_a_cut_tar_keeps_what_is_whole(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    dataset = open_store(tmp_path / "set")
    shard = adopt(dataset, store_tar(open_store(tmp_path), make_tar(members)[:100_000]))
    kept = sum(row["status"] == "ok" for row in rows_of(shard))
    assert 0 < kept < 20
    assert rows_of(shard)[-1]["reason"] == "truncated"
    assert check(dataset).samples == kept


def test_every_input_is_told(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    told: list[bool] = []
    file = store_tar(open_store(tmp_path), make_tar(members))
    index_tar(file, keys=KEYS, judge=JUDGE, on_image=told.append)
    assert told == [False] * 20 + [True] * 2


def test_a_gzipped_tar_cannot_be_adopted(tmp_path: Path) -> None:
    file = store_tar(open_store(tmp_path), gzip.compress(make_tar([])), "x.tar.gz")
    with pytest.raises(UsageError, match=r"x\.tar\.gz: .*pack it, or unpack"):
        index_tar(file, keys=KEYS, judge=JUDGE)


def test_a_tar_where_the_loader_cannot_read(members: list[tuple[str, bytes]]) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/adopted/x.tar", make_tar(members))
    file = find_file("memory://adopted/x.tar")
    assert file is not None
    with pytest.raises(UsageError, match="is no store"):
        index_tar(file, keys=KEYS, judge=JUDGE)


def test_a_tar_that_changes_while_it_is_read(
    dataset: str, members: list[tuple[str, bytes]]
) -> None:
    store = open_store(dataset)
    file = store_tar(store, make_tar(members))

    def change(_: bool) -> None:
        store_tar(store, make_tar(members[3:]))

    shard = index_tar(file, keys=KEYS, judge=JUDGE, on_image=change)
    [row] = shard.rows.table().to_pylist()
    assert (row["key"], row["source"], row["status"]) == (KEYS(0), file.url, "rejected")
    assert (row["reason"], shard.is_readable) == ("changed", False)


def test_a_tar_that_is_gone(dataset: str, members: list[tuple[str, bytes]]) -> None:
    store = open_store(dataset)
    file = store_tar(store, make_tar(members))
    store_tar(store, make_tar(members), "y.tar")
    store.delete("x.tar")
    shard = index_tar(file, keys=KEYS, judge=JUDGE)
    assert [row["reason"] for row in shard.rows.table().to_pylist()] == ["missing"]
    assert not shard.is_readable


def test_nothing_is_encoded_again(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    settings = ImageSettings(encode="png")
    file = store_tar(open_store(tmp_path), make_tar(members))
    with pytest.raises(UsageError, match="cannot be encoded again"):
        index_tar(file, keys=KEYS, judge=partial(judge, settings=settings))
