"""What a data set holds: images, bytes, formats, sizes, labels, and what was rejected and why."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.manifest import Snapshot
from pipeline.shards import read_index
from pipeline.store import Store, resolve

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
EXACT_UP_TO = 1_000_000  # values; of more, every second, fourth, … is looked at
READERS = 8

Numbers = npt.NDArray[np.int64]


@dataclass
class Stats:
    """Counts over a snapshot. Quantiles are at QUANTILES, in pixels and bytes."""

    version: int
    shards: int
    rows: int = 0
    images: int = 0  # not rejected
    kept: int = 0  # neither rejected nor masked
    image_bytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    quantiles: dict[str, list[int]] = field(default_factory=dict)


def collect(dataset: Store, snapshot: Snapshot) -> Stats:
    """Read every index of a snapshot and count. Raises ShardError, StoreError."""
    stats = Stats(snapshot.version, len(snapshot), kept=snapshot.num_kept)
    formats: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    spreads = {name: Spread() for name in ("width", "height", "length")}
    for index in _read_indexes(dataset, snapshot):
        images = index.filter(pc.equal(index["status"], "ok"))
        rejects = index.filter(pc.not_equal(index["status"], "ok"))
        stats.rows += len(index)
        stats.images += len(images)
        stats.image_bytes += pc.sum(images["length"]).as_py() or 0
        formats.update(_counts(images, "format"))
        rejected.update(_counts(rejects, "reason"))
        if "label" in index.column_names:
            labels.update(_counts(images, "label"))
        for name, spread in spreads.items():
            spread.add(images[name].drop_null().to_numpy())
    stats.formats, stats.rejected, stats.labels = dict(formats), dict(rejected), dict(labels)
    stats.quantiles = {
        name: values for name, spread in spreads.items() if (values := spread.quantiles())
    }
    return stats


class Spread:
    """Quantiles in bounded memory: exact for the first million values, then of every 2nd, 4th, …"""

    def __init__(self, exact_up_to: int = EXACT_UP_TO) -> None:
        self._limit = exact_up_to
        self._step = 1
        self._skip = 0  # values to pass over before the next one that counts
        self._kept: Numbers = np.empty(0, np.int64)

    def add(self, values: Numbers) -> None:
        """Take note of more values."""
        chosen = values[self._skip :: self._step]
        self._skip = (self._skip - len(values)) % self._step
        self._kept = np.concatenate([self._kept, chosen])
        while len(self._kept) > self._limit:
            self._skip += self._step * (len(self._kept) % 2)
            self._kept = self._kept[::2]
            self._step *= 2

    def quantiles(self) -> list[int]:
        """The values at QUANTILES, each of them one that occurs; empty if there is none."""
        if not len(self._kept):
            return []
        return [int(q) for q in np.quantile(self._kept, QUANTILES, method="inverted_cdf")]


def _read_indexes(dataset: Store, snapshot: Snapshot) -> Iterator[pa.Table]:
    def read(shard: int) -> pa.Table:
        store, key = resolve(dataset, snapshot.index[shard])
        return read_index(
            store.get(key), where=store.url_of(key), sha256=snapshot.index_sha256[shard]
        )

    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(snapshot), READERS):  # map alone would read all ahead
            yield from readers.map(read, range(start, min(start + READERS, len(snapshot))))


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    counted = pc.value_counts(table[column].drop_null()).to_pylist()
    return {entry["values"]: entry["counts"] for entry in counted}
