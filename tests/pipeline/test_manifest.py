"""Commits: the first wins, whatever happens to answers. Snapshots: found without a listing."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.errors import AccessDeniedError, ManifestError, StoreError
from pipeline.manifest import (
    SNAPSHOT_SCHEMA,
    Snapshot,
    commit,
    commit_snapshot,
    latest_version,
    new_attempt,
    prove_conditional_put,
    read_commit,
    read_snapshot,
    snapshot_key,
)
from pipeline.store import Store, open_store


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_url"))
    return open_store(tmp_path / "set")


def shard(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "tar": f"data/00/{number}.tar",
        "index": f"data/00/{number}.parquet",
        "tar_bytes": 1000 + number,
        "index_bytes": 100,
        "tar_hash": bytes(32),
        "index_sha256": bytes([number % 256]) * 32,
        "rows": 10,
        "kept": number % 3,
    }
    return {**row, **changes}


def shards(count: int) -> pa.Table:
    return pa.Table.from_pylist([shard(n) for n in range(count)], SNAPSHOT_SCHEMA)


def test_the_first_commit_wins(store: Store) -> None:
    first = commit(store, "commits/p/0.json", {"tar": "a", "n": 1}, attempt="one")
    assert first == {"tar": "a", "n": 1, "attempt": "one"}
    assert commit(store, "commits/p/0.json", {"tar": "b"}, attempt="two") == first
    assert read_commit(store, "commits/p/0.json") == first
    assert read_commit(store, "commits/p/1.json") is None


def test_a_commit_is_the_same_bytes_whatever_the_order_of_its_keys(store: Store) -> None:
    commit(store, "a", {"x": 1, "y": [1, 2]}, attempt="t")
    commit(store, "b", {"y": [1, 2], "x": 1}, attempt="t")
    assert store.get("a") == store.get("b")


def test_one_of_many_wins_and_all_know_who(store: Store) -> None:
    barrier = threading.Barrier(8)

    def contend(attempt: str) -> str:
        barrier.wait()
        return str(commit(store, "key", {}, attempt=attempt)["attempt"])

    with ThreadPoolExecutor(8) as threads:
        winners = set(threads.map(contend, [new_attempt() for _ in range(8)]))
    assert len(winners) == 1


class LosesAnswers(Store):
    """A store that does what it is told and then fails to say so, as a broken connection does."""

    def __init__(self, store: Store, *, does_it: bool) -> None:
        self.__dict__.update(store.__dict__)
        self._does_it = does_it

    def put_if_absent(self, key: str, body: bytes) -> bool:
        if self._does_it:
            super().put_if_absent(key, body)
        raise StoreError("the connection broke")


def test_a_lost_answer_is_looked_up(store: Store) -> None:
    lossy = LosesAnswers(store, does_it=True)
    assert commit(lossy, "key", {}, attempt="mine")["attempt"] == "mine"
    assert commit(lossy, "key", {}, attempt="other")["attempt"] == "mine"
    with pytest.raises(StoreError, match="the connection broke"):
        commit(LosesAnswers(store, does_it=False), "another", {}, attempt="mine")


def test_damaged_commits(store: Store) -> None:
    store.put_if_absent("a", b"{")
    store.put_if_absent("b", b"[]")
    for key in ("a", "b"):
        with pytest.raises(ManifestError, match=f"/{key}: damaged"):
            read_commit(store, key)


def test_a_good_store_proves_itself_and_keeps_no_trace(store: Store) -> None:
    prove_conditional_put(store)
    assert list(store.list()) == []


class Overwrites(Store):
    """A store that ignores If-None-Match, as old S3 servers do."""

    def __init__(self, store: Store) -> None:
        self.__dict__.update(store.__dict__)

    def put_if_absent(self, key: str, body: bytes) -> bool:
        self.delete(key)
        return super().put_if_absent(key, body)


def test_a_store_without_conditions_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="ignores If-None-Match"):
        prove_conditional_put(Overwrites(store))
    assert list(store.list()) == []


def test_a_prefix_we_may_not_write(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessDeniedError):
        prove_conditional_put(open_store(s3_url))


def test_snapshots(store: Store) -> None:
    assert latest_version(store) == 0
    written = commit_snapshot(store, shards(4), version=1, attempt="a", plans=["p"])
    assert written.attempt == "a"
    snapshot = read_snapshot(store)
    assert (snapshot.version, snapshot.parent, snapshot.plans, len(snapshot)) == (1, 0, ("p",), 4)
    assert snapshot.num_kept == 3
    assert snapshot.first_row.tolist() == [0, 0, 1, 3, 3]
    assert snapshot.first_row.dtype == np.int64
    assert snapshot.tar[2] == "data/00/2.tar"
    assert snapshot.tar_bytes[2] == 1002
    assert snapshot.index_sha256[3] == bytes([3]) * 32
    assert snapshot.tar_tag[0] is None
    assert snapshot.mask[0] is None
    assert list(snapshot.index[1:3]) == ["data/00/1.parquet", "data/00/2.parquet"]


def test_the_first_snapshot_of_a_version_wins(store: Store) -> None:
    commit_snapshot(store, shards(1), version=1, attempt="a")
    assert commit_snapshot(store, shards(2), version=1, attempt="b").attempt == "a"
    assert len(read_snapshot(store)) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9])
def test_the_latest_version_is_probed(tmp_path: Path, count: int) -> None:
    store = open_store(tmp_path)
    for version in range(1, count + 1):
        commit_snapshot(store, shards(version), version=version, attempt="a")
    assert latest_version(store) == count
    assert len(read_snapshot(store)) == count
    assert len(read_snapshot(store, 1)) == 1


def test_no_snapshot(store: Store) -> None:
    with pytest.raises(ManifestError, match=r"has no snapshot: .*python -m shard_tools pack"):
        read_snapshot(store)
    commit_snapshot(store, shards(1), version=1, attempt="a")
    with pytest.raises(ManifestError, match="has no snapshot 7"):
        read_snapshot(store, 7)


def test_damaged_snapshots(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    commit_snapshot(store, shards(500), version=1, attempt="a")
    path = tmp_path / snapshot_key(1)
    body = path.read_bytes()
    for position in range(0, len(body), 97):
        damaged = bytearray(body)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with contextlib.suppress(ManifestError):  # else a byte that says nothing was hit
            assert read_snapshot(store).table.equals(shards(500))
    path.write_bytes(body[:100])
    with pytest.raises(ManifestError, match=r"v000001\.parquet: damaged"):
        read_snapshot(store)


def test_a_million_shards_fit_in_memory() -> None:
    """Columns stay in Arrow's memory: nothing is turned into Python objects."""
    count = 1_000_000
    numbers = pa.array(np.arange(count))
    names = pc.binary_join_element_wise(
        "data/ab/01234567-", numbers.cast(pa.string()), "-01234567.tar", ""
    )
    digests = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), count, [None, pa.py_buffer(bytes(32 * count))]
    )
    nulls = pa.nulls(count, pa.string())
    columns = [names, names, numbers, numbers, names, nulls, digests, digests, numbers, numbers]
    columns += [nulls, pa.nulls(count, pa.binary())]
    before = pa.total_allocated_bytes()
    snapshot = Snapshot(pa.table(columns, schema=SNAPSHOT_SCHEMA), 1)
    assert snapshot.tar[999_999] == "data/ab/01234567-999999-01234567.tar"
    assert snapshot.table.nbytes < 250e6
    assert pa.total_allocated_bytes() - before < 10e6  # views, no copies
