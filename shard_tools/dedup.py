"""Dedup: a version of a data set in which every image is seen once, and a table of what was alike.

Exact by SHA-256, near by the 64-bit perceptual hash (see pipeline.decode.perceptual_hash), over the
rows that readers see now; what "the same" means is in shard_tools.leaders. Nothing is rewritten:
the result is a mask (shard_tools.mask), so going back a version undoes it. The clusters lie beside
the data, `dedup/<attempt>/clusters.parquet`, so that a person sees what was dropped for what.

All of it runs in one process in memory: some 50 bytes a row, twice that at the peak.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CropstreamError, UsageError
from pipeline.manifest import Snapshot, new_attempt, read_snapshot
from pipeline.store import PART_BYTES, Store
from shard_tools.hamming import MAX_DISTANCE, Numbers
from shard_tools.indexes import Flags, ShardRows, read_indexes, read_rows
from shard_tools.leaders import (
    Prefer,
    Rows,
    distances,
    exact_leaders,
    has_telling_hash,
    near_leaders,
)
from shard_tools.mask import mask_snapshot

FLAT_BITS = 3  # a hash with at most so many bits unlike the others tells nothing

# Measured with ten million rows; they only decide what is refused and what is stored in memory.
_ROW_BYTES, _PAIR_BYTES, _BASE_BYTES = 120, 64, 400_000_000

CLUSTERS_SCHEMA = pa.schema(
    [
        pa.field("cluster", pa.int64(), nullable=False),  # 0, 1, … in the order of what is kept
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("distance", pa.uint8(), nullable=False),  # in bits, to the one that is kept
        pa.field("shard", pa.int64(), nullable=False),  # its number in the version looked at
        pa.field("row", pa.int64(), nullable=False),  # of the shard's index
        pa.field("key", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("sha256", pa.binary()),  # equal to that of the kept one: an exact copy
        pa.field("phash", pa.uint64()),
    ]
)
"""The table of clusters: each one's kept row first, then by shard and row."""


@dataclass(frozen=True)
class DedupReport:
    """What dedup found, and what readers see now."""

    snapshot: Snapshot
    is_new: bool  # False: a dry run, or nothing was alike
    images: int  # looked at
    exact: int  # dropped for an image of the same bytes
    near: int  # dropped for an image within the distance
    clusters: int
    without_hash: int  # images never decoded: exact only
    flat: int  # images whose hash tells nothing: exact only
    clusters_url: str | None
    seconds: float


@dataclass
class _Found:
    """The outcome over the kept rows of a snapshot: `leaders[n]` is what row n is dropped for."""

    rows: Rows
    row_numbers: npt.NDArray[np.int32]  # in the shards' indexes
    leaders: Numbers
    exact: int  # rows dropped for one of the same bytes

    @property
    def near(self) -> int:
        return _num_dropped(self.leaders) - self.exact

    @property
    def is_dropped(self) -> Flags:
        result: Flags = self.leaders != np.arange(len(self.leaders))
        return result


def dedup(
    dataset: Store,
    *,
    near: bool = True,
    distance: int = 3,
    prefer: Prefer = "largest",
    flat_bits: int = FLAT_BITS,
    dry_run: bool = False,
    memory_bytes: float = 2e9,
    threads: int = 2,
    on_tick: Callable[[int, int], None] = lambda done, rejected: None,
) -> DedupReport:
    """Mask every image of the newest version that another one stands for.

    The same for the same version. Looking at the rows is told to `on_tick`, as (rows, 0).

    Args:
        near: also what is alike, not only equal. distance: 0 … 8 bits of 64. prefer: keep the one
        with the most pixels, then bytes, then the first; or simply the "first". flat_bits: hashes
        with at most so many bits unlike the others count as none. dry_run: only report.

    Raises UsageError if a setting is out of range or the memory allowed cannot hold the rows;
    CropstreamError if masks changed meanwhile; ShardError, StoreError.
    """
    started = time.monotonic()
    snapshot = read_snapshot(dataset)
    _check(snapshot, distance, prefer, flat_bits, memory_bytes)
    rows, row_numbers = _read_columns(dataset, snapshot, on_tick)
    flat = int((rows.has_phash & ~has_telling_hash(rows, flat_bits)).sum())
    leaders = exact_leaders(rows, prefer)
    rows.sha256 = None
    found = _Found(rows, row_numbers, leaders, exact=_num_dropped(leaders))
    if near:
        found.leaders = near_leaders(
            rows,
            leaders,
            distance=distance,
            flat_bits=flat_bits,
            prefer=prefer,
            max_pairs=_max_pairs(len(rows), memory_bytes),
            threads=threads,
        )
    key = None
    if found.near + found.exact and not dry_run:
        key = _write_clusters(dataset, snapshot, found, memory_bytes)
        how = f"distance {distance}" if near else "exact only"
        snapshot = _hide(dataset, snapshot, found, how, key)
    return DedupReport(
        snapshot=snapshot,
        is_new=key is not None,
        images=len(rows),
        exact=found.exact,
        near=found.near,
        clusters=len(np.unique(found.leaders[found.is_dropped])),
        without_hash=int((~rows.has_phash).sum()),
        flat=flat,
        clusters_url=dataset.url_of(key) if key else None,
        seconds=time.monotonic() - started,
    )


def _hide(dataset: Store, snapshot: Snapshot, found: _Found, how: str, key: str) -> Snapshot:
    """Commit the version without the copies; its note names the table of clusters."""
    note = (
        f"dedup of version {snapshot.version} ({how}): {found.exact} exact and {found.near} "
        f"near copies dropped, clusters: {key}"
    )
    decide = _decider(dataset, snapshot, found)
    return mask_snapshot(dataset, decide=decide, note=note).snapshot


def _num_dropped(leaders: Numbers) -> int:
    return int((leaders != np.arange(len(leaders))).sum())


def _max_pairs(num_rows: int, memory_bytes: float) -> int:
    """What fits beside the rows; a quarter of the memory at least, for many rows are not paired."""
    spare_bytes = memory_bytes - _BASE_BYTES - _ROW_BYTES * num_rows
    return int(max(spare_bytes, memory_bytes / 4) / _PAIR_BYTES)


def _check(
    snapshot: Snapshot, distance: int, prefer: str, flat_bits: int, memory_bytes: float
) -> None:
    if not 0 <= distance <= MAX_DISTANCE:
        raise UsageError(f"distance {distance}: give 0 to {MAX_DISTANCE} bits of 64")
    if prefer not in get_args(Prefer):
        raise UsageError(f"prefer {prefer!r} is none of {', '.join(get_args(Prefer))}")
    if not 0 <= flat_bits < 32:
        raise UsageError(f"flat_bits {flat_bits}: give 0 to 31 bits of 64")
    needed_bytes = _BASE_BYTES + _ROW_BYTES * snapshot.num_kept
    if needed_bytes > memory_bytes:
        raise UsageError(
            f"{snapshot.num_kept} images need about {needed_bytes / 1e9:.1f} GB of memory, allowed "
            f"are {memory_bytes / 1e9:.1f}: allow more"
        )


# ----------------------------------------------------------------------------------------
# reading


def _read_columns(
    dataset: Store, snapshot: Snapshot, on_tick: Callable[[int, int], None]
) -> tuple[Rows, npt.NDArray[np.int32]]:
    """The columns of all kept rows and their numbers in their indexes."""
    size = snapshot.num_kept
    sha256 = np.empty((size, 2), np.uint64)
    rows = Rows(
        sha256,
        phash=np.empty(size, np.uint64),
        has_phash=np.empty(size, np.bool_),
        pixels=np.empty(size, np.int64),
        length_bytes=np.empty(size, np.int64),
    )
    row_numbers = np.empty(size, np.int32)
    done = 0
    for shard in read_indexes(dataset, snapshot):
        part = slice(*snapshot.first_row[shard.shard : shard.shard + 2])
        row_numbers[part] = kept = np.flatnonzero(shard.kept)
        where = dataset.url_of(snapshot.index[shard.shard])
        sha256[part] = _hash_words(shard.table["sha256"], where)[kept]
        phash = shard.table["phash"]
        rows.has_phash[part] = phash.is_valid().to_numpy()[kept]
        rows.phash[part] = phash.fill_null(0).to_numpy()[kept]
        width, height = (_int64(shard.table[name])[kept] for name in ("width", "height"))
        rows.pixels[part] = width * height
        rows.length_bytes[part] = _int64(shard.table["length"])[kept]
        on_tick(done := done + len(shard.table), 0)
    return rows, row_numbers


def _int64(column: pa.ChunkedArray) -> Numbers:
    values: Numbers = column.fill_null(0).to_numpy().astype(np.int64)
    return values


def _hash_words(column: pa.ChunkedArray, where: str) -> npt.NDArray[np.uint64]:
    """The first 16 bytes of every SHA-256 as uint64 [rows, 2]; what a null gives is arbitrary."""
    pieces = []
    for chunk in column.chunks:
        body = np.frombuffer(chunk.buffers()[1], np.uint64).reshape(-1, 4)
        pieces.append(body[chunk.offset : chunk.offset + len(chunk), :2])
    if not pieces:
        return np.empty((0, 2), np.uint64)
    return np.concatenate(pieces)


# ----------------------------------------------------------------------------------------
# writing


def _decider(
    dataset: Store, snapshot: Snapshot, found: _Found
) -> Callable[[str, ShardRows], Flags]:
    """What mask_snapshot asks; shards that were added meanwhile are left as they are."""
    numbers = {tar: number for number, tar in enumerate(snapshot.table["tar"].to_pylist())}
    is_dropped = found.is_dropped

    def decide(tar: str, rows: ShardRows) -> Flags:
        shard = numbers.get(tar)
        if shard is None:
            return rows.has_bit
        part = slice(*snapshot.first_row[shard : shard + 2])
        row_numbers = found.row_numbers[part]
        if not np.array_equal(np.flatnonzero(rows.kept), row_numbers):
            raise CropstreamError(
                f"{dataset.url}: while dedup looked at version {snapshot.version}, rows of {tar} "
                "were masked, maybe the very ones that were to be kept; run dedup again"
            )
        bits = rows.has_bit.copy()
        bits[row_numbers[is_dropped[part]]] = False
        return bits

    return decide


def _write_clusters(dataset: Store, snapshot: Snapshot, found: _Found, memory_bytes: float) -> str:
    """Write the table of clusters and return its key. Sorted on disk if it is large."""
    import duckdb  # takes a fifth of a second, which no other command needs to spend

    attempt = new_attempt()
    key = f"dedup/{attempt}/clusters.parquet"
    with tempfile.TemporaryDirectory(prefix="shard_tools-") as folder:
        settings = {
            "enable_external_access": "false",
            "temp_directory": folder,
            "memory_limit": f"{int(memory_bytes / 4e6)}MB",
            "threads": "1",
        }
        with duckdb.connect(str(Path(folder) / "clusters.db"), config=settings) as connection:
            connection.execute("SET enable_progress_bar = false").fetchall()  # it goes to stdout
            connection.register("piece", CLUSTERS_SCHEMA.empty_table())
            connection.execute("CREATE TABLE clusters AS FROM piece").fetchall()
            for piece in _cluster_pieces(dataset, snapshot, found):
                connection.register("piece", piece)
                connection.execute("INSERT INTO clusters FROM piece").fetchall()
            ordered = connection.sql(
                "FROM clusters ORDER BY cluster, kept DESC, shard, row"
            ).to_arrow_reader(100_000)
            with pq.ParquetWriter(
                Path(folder) / "clusters.parquet", CLUSTERS_SCHEMA, compression="zstd"
            ) as writer:
                for batch in ordered:
                    writer.write_table(pa.Table.from_batches([batch]).cast(CLUSTERS_SCHEMA))
        _upload(Path(folder) / "clusters.parquet", dataset, key)
    return key


def _cluster_pieces(dataset: Store, snapshot: Snapshot, found: _Found) -> Iterator[pa.Table]:
    """The rows of the clusters, by shard."""
    is_dropped = found.is_dropped
    kept_ones = np.unique(found.leaders[is_dropped])
    is_member = is_dropped
    is_member[kept_ones] = True
    for shard in range(len(snapshot)):
        start, stop = snapshot.first_row[shard : shard + 2]
        members = start + np.flatnonzero(is_member[start:stop])
        if not len(members):
            continue
        leaders = found.leaders[members]
        row_numbers = found.row_numbers[members]
        index = read_rows(dataset, snapshot, shard).table.take(row_numbers)
        columns = {
            "cluster": np.searchsorted(kept_ones, leaders),
            "kept": leaders == members,
            "distance": distances(found.rows, members, leaders),
            "shard": np.full(len(members), shard),
            "row": row_numbers,
            **{name: index[name] for name in ("key", "source", "sha256", "phash")},
        }
        yield pa.table(columns).cast(CLUSTERS_SCHEMA)


def _upload(file: Path, dataset: Store, key: str) -> None:
    with file.open("rb") as body, dataset.writer(key) as output:
        while piece := body.read(PART_BYTES):
            output.write(piece)
