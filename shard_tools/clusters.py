"""Some clusters of a dedup to look at: the largest ones, and others drawn at random.

Called by the gallery; the table is written by shard_tools.dedup. Of a table of millions only the
column of cluster numbers is read as a whole, of the chosen clusters then a few members.
"""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import ManifestError
from pipeline.store import Store

NUM_MEMBERS = 8  # of a cluster that are shown

_COLUMNS = ("cluster", "kept", "shard", "row", "key", "distance")


@dataclass(frozen=True)
class Member:
    """One image of a cluster; `distance` in bits, to the one that is kept."""

    shard: int
    row: int
    key: str
    kept: bool
    distance: int | None


@dataclass(frozen=True)
class Cluster:
    """One cluster: how many images it has, and the first of them, the kept one before all."""

    size: int
    members: list[Member]


def read_clusters(dataset: Store, key: str, *, num_clusters: int, seed: int) -> list[Cluster]:
    """Up to `num_clusters` clusters, the larger first: half of them the largest, half at random.

    The same for the same table and seed. Raises ManifestError if the table is damaged or none of
    clusters; ObjectMissingError, StoreError.
    """
    body = dataset.get(key)
    try:
        with pq.ParquetFile(io.BytesIO(body)) as file:
            numbers = file.read(["cluster"], use_threads=False)["cluster"].to_numpy()
            names, sizes = np.unique(numbers, return_counts=True)
            chosen = _choose(sizes, num_clusters, seed)
            rows = _rows_of(file, names[chosen])
        return [Cluster(int(sizes[c]), _members(rows, int(names[c]))) for c in chosen]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        url = dataset.url_of(key)
        raise ManifestError(f"{url}: no table of clusters; run dedup again: {error}") from None


def _choose(sizes: npt.NDArray[np.int64], num_clusters: int, seed: int) -> npt.NDArray[np.int64]:
    """Places of the chosen clusters, the larger first."""
    order = np.argsort(-sizes, kind="stable")
    num_largest = (num_clusters + 1) // 2
    largest, others = order[:num_largest], order[num_largest:]
    number = min(num_clusters - num_largest, len(others))
    drawn = np.random.default_rng(seed).choice(len(others), number, replace=False)
    return np.concatenate([largest, others[np.sort(drawn)]])


def _rows_of(file: pq.ParquetFile, names: npt.NDArray[np.int64]) -> pa.Table:
    wanted = pa.array(names)
    batches = file.iter_batches(columns=list(_COLUMNS), use_threads=False)
    pieces = [
        pa.Table.from_batches([batch.filter(pc.is_in(batch["cluster"], value_set=wanted))])
        for batch in batches
    ]
    return pa.concat_tables(pieces) if pieces else file.read(list(_COLUMNS))


def _members(rows: pa.Table, name: int) -> list[Member]:
    found = rows.filter(pc.equal(rows["cluster"], name)).drop_columns("cluster").to_pylist()
    members = [Member(**row) for row in found]
    return sorted(members, key=lambda member: not member.kept)[:NUM_MEMBERS]
