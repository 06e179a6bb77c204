"""Clusters of near duplicates for people to look at, from the table that `dedup` leaves behind.

The table (Parquet: cluster, kept, shard, row, key, distance, …; a row a member) may be as long as
the data set. It is read by ranges, and only its first million rows.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ManifestError, ObjectMissingError
from pipeline.store import Store

MAX_ROWS = 1_000_000
MAX_MEMBERS = 12
_COLUMNS = ["cluster", "kept", "shard", "row", "key", "distance"]
_BATCH_ROWS = 65_536


@dataclass(frozen=True)
class Member:
    """One image of a cluster: the row `row` of the index of shard number `shard`."""

    shard: int
    row: int
    key: str
    kept: bool
    distance: int | None  # bits that differ from the kept image's hash


@dataclass(frozen=True)
class Cluster:
    """Images that dedup holds for the same; `members` are some, the kept one first."""

    number: int
    size: int
    members: list[Member]


def read_clusters(dataset: Store, key: str, *, num_clusters: int, seed: int) -> list[Cluster]:
    """The largest clusters, largest first, then as many random others.

    Raises ManifestError if the table is damaged, ObjectMissingError if it is gone; StoreError.
    """
    info = dataset.head(key)
    if info is None:
        raise ObjectMissingError(f"{dataset.url_of(key)} is no longer there")
    file = _ObjectFile(dataset, key, info.size_bytes)
    try:
        with pq.ParquetFile(pa.PythonFile(file, mode="r")) as table:
            sizes = _choose(_sizes(table), num_clusters, seed)
            return _with_members(table, sizes)
    except (pa.ArrowException, KeyError) as error:
        where = dataset.url_of(key)
        raise ManifestError(f"{where}: no readable table of clusters: {error}") from None


def _batches(table: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    rows = 0
    for batch in table.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
        yield batch
        if (rows := rows + len(batch)) >= MAX_ROWS:
            return


def _sizes(table: pq.ParquetFile) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for batch in _batches(table, ["cluster"]):
        numbers, counts = np.unique(batch["cluster"].to_numpy(), return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            sizes[number] = sizes.get(number, 0) + count
    return sizes


def _choose(sizes: dict[int, int], num_clusters: int, seed: int) -> dict[int, int]:
    ordered = sorted(sizes, key=lambda number: (-sizes[number], number))
    largest, others = ordered[: num_clusters // 2], ordered[num_clusters // 2 :]
    places = np.random.default_rng(seed).permutation(len(others))[: num_clusters - len(largest)]
    return {number: sizes[number] for number in [*largest, *(others[i] for i in sorted(places))]}


def _with_members(table: pq.ParquetFile, sizes: dict[int, int]) -> list[Cluster]:
    members: dict[int, list[Member]] = {number: [] for number in sizes}
    for batch in _batches(table, _COLUMNS):
        is_chosen = np.isin(batch["cluster"].to_numpy(), list(sizes))
        for row in batch.filter(pa.array(is_chosen)).to_pylist():
            _add_member(members[row.pop("cluster")], Member(**row))
    return [Cluster(number, size, members[number]) for number, size in sizes.items()]


def _add_member(members: list[Member], member: Member) -> None:
    members.insert(0 if member.kept else len(members), member)
    del members[MAX_MEMBERS:]


class _ObjectFile(io.RawIOBase):
    """A stored object as a file that can be read anywhere."""

    def __init__(self, store: Store, key: str, size_bytes: int) -> None:
        self._store, self._key, self._size_bytes = store, key, size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}
        self._position = origin[whence] + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        rest = max(self._size_bytes - self._position, 0)
        length = rest if size < 0 else min(size, rest)
        body = self._store.get_range(self._key, self._position, length)
        self._position += length
        return body
