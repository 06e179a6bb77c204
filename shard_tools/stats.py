"""What a data set holds: images, bytes, formats, sizes, labels, origins, and what was rejected.

One pass over the indexes of a snapshot, in memory that depends neither on the number of shards nor
of rows: quantiles are of a thinned sample beyond a million values, rare names of labels and origins
are counted as others (see shard_tools.tally).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.manifest import Snapshot
from pipeline.store import Store
from shard_tools.indexes import Flags, ShardRows, read_indexes
from shard_tools.origins import Origins
from shard_tools.show import listed, plural, size
from shard_tools.tally import QUANTILES, Histogram, LogBins, Spread, Tally

TOP_SOURCES = 50
TOP_LABELS = 1000
_SHOWN_LABELS = 20
_SHOWN_SOURCES = 10
_KEPT, _MASKED, _REJECTED = range(3)
_UNITS = {"width": "width px", "height": "height px", "length": "bytes", "aspect": "width/height"}


@dataclass
class SourceCounts:
    """How many rows come from one origin (see shard_tools.origins)."""

    kept: int
    masked: int
    rejected: int


@dataclass
class Stats:
    """Counts over a snapshot.

    From `image_bytes` on, all of it describes the kept images, those that readers see. Quantiles
    are at `quantile_levels`: width and height in pixels, length in bytes, aspect = width / height.
    Histograms, with bins of equal ratio, are of these and of `pixels`.
    """

    version: int
    shards: int
    rows: int = 0  # images, rejects, and rejects that a retry superseded
    images: int = 0  # not rejected
    masked: int = 0  # images that a mask hides: removed, duplicates, …
    kept: int = 0  # the other images
    superseded: int = 0  # rejects that were tried again
    rejected: dict[str, int] = field(default_factory=dict)  # reason: the other rejects
    image_bytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)  # the TOP_LABELS most frequent
    num_labels: int = 0  # different ones; "at least", if there are very many
    other_labels: int = 0  # images of labels that are not named here
    quantile_levels: tuple[float, ...] = QUANTILES
    quantiles: dict[str, list[float]] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    sources: dict[str, SourceCounts] = field(default_factory=dict)  # TOP_SOURCES, largest first
    other_sources: SourceCounts = field(default_factory=lambda: SourceCounts(0, 0, 0))


def collect(
    dataset: Store, snapshot: Snapshot, *, on_tick: Callable[[int, int], None] | None = None
) -> Stats:
    """Read every index of a snapshot and count. Raises ShardError, StoreError.

    `on_tick` is called after every shard with the rows and rejects so far; there are
    `snapshot.rows.sum()` rows in all.
    """
    collector = Collector(snapshot)
    for rows in read_indexes(dataset, snapshot):
        collector.add(rows)
        if on_tick is not None:
            on_tick(collector.num_rows, collector.num_rejected)
    return collector.stats()


class Collector:
    """Adds up Stats shard by shard."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._stats = Stats(snapshot.version, len(snapshot))
        self._formats: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._labels = Tally()
        self._origins = Origins(num_kinds=3)
        self._spreads = {name: Spread() for name in ("width", "height", "length", "aspect")}
        self._bins = {
            "width": LogBins(4),
            "height": LogBins(4),
            "aspect": LogBins(6, centred=True),
            "pixels": LogBins(1),
            "length": LogBins(1),
        }

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return self._stats.rows

    @property
    def num_rejected(self) -> int:
        """Rejects so far."""
        return self._rejected.total()

    def add(self, rows: ShardRows) -> None:
        """Count one shard."""
        kept, masked, rejected = rows.kept, rows.masked, rows.rejected
        self._add_totals(rows, kept, masked)
        table = rows.table.filter(kept)
        self._rejected.update(_counts(rows.table.filter(rejected), "reason"))
        self._formats.update(_counts(table, "format"))
        if "label" in table.column_names:
            for label, count in _counts(table, "label").items():
                self._labels.add(label, count)
        for kind, flags in ((_KEPT, kept), (_MASKED, masked), (_REJECTED, rejected)):
            self._origins.add(rows.table["source"].filter(flags), kind)
        self._add_sizes(table)

    def stats(self) -> Stats:
        """What was counted."""
        stats = self._stats
        stats.formats = dict(self._formats.most_common())
        stats.rejected = dict(self._rejected.most_common())
        labels, others = self._labels.top(TOP_LABELS)
        stats.labels = {name: counts[0] for name, counts in labels.items()}
        stats.num_labels, stats.other_labels = len(self._labels), others[0]
        stats.quantiles = {name: q for name, s in self._spreads.items() if (q := s.quantiles())}
        stats.histograms = {name: bins.histogram() for name, bins in self._bins.items()}
        sources, elsewhere = self._origins.top(TOP_SOURCES)
        stats.sources = {name: SourceCounts(*counts) for name, counts in sources.items()}
        stats.other_sources = SourceCounts(*elsewhere)
        return stats

    def _add_totals(self, rows: ShardRows, kept: Flags, masked: Flags) -> None:
        stats = self._stats
        stats.rows += len(kept)
        stats.images += int(rows.is_ok.sum())
        stats.kept += int(kept.sum())
        stats.masked += int(masked.sum())
        stats.superseded += int((~rows.is_ok & ~rows.has_bit).sum())
        stats.image_bytes += pc.sum(rows.table["length"].filter(kept)).as_py() or 0

    def _add_sizes(self, table: pa.Table) -> None:
        width, height, length = (table[name] for name in ("width", "height", "length"))
        values = {"width": width, "height": height, "length": length}
        sizes = {name: column.drop_null().to_numpy() for name, column in values.items()}
        has_size = pc.and_(pc.is_valid(width), pc.greater(pc.fill_null(height, 0), 0))
        wide, high = (c.filter(has_size).to_numpy().astype(np.int64) for c in (width, height))
        sizes |= {"aspect": wide / high, "pixels": wide * high}
        for name, spread in self._spreads.items():
            spread.add(sizes[name])
        for name, bins in self._bins.items():
            bins.add(sizes[name])


def table(stats: Stats) -> str:
    """The figures as lines for people."""
    lines = [
        ("snapshot", f"version {stats.version}: {plural(stats.shards, 'shard')}"),
        ("images", f"{stats.kept}, {size(stats.image_bytes)}"),
        ("masked", str(stats.masked) if stats.masked else ""),
        ("rejected", _with_total(stats.rejected)),
        ("superseded", f"{stats.superseded} rejects, tried again" if stats.superseded else ""),
        ("formats", listed(stats.formats)),
        ("labels", _labels(stats)),
        ("sources", _sources(stats)),
    ]
    return "\n".join([*(f"{name:<12}{text}" for name, text in lines if text), *_quantiles(stats)])


def _with_total(counts: Mapping[str, int]) -> str:
    total = str(sum(counts.values()))
    return f"{total}: {listed(counts)}" if counts else total


def _labels(stats: Stats) -> str:
    shown = dict(Counter(stats.labels).most_common(_SHOWN_LABELS))
    more = ", …" if stats.num_labels > len(shown) else ""
    return f"{stats.num_labels}: {listed(shown)}{more}" if shown else "0"


def _sources(stats: Stats) -> str:
    """Kept images by origin."""
    shown = {n: c.kept for n, c in list(stats.sources.items())[:_SHOWN_SOURCES]}
    named = ", ".join(f"{name} {count}" for name, count in shown.items())
    return f"{named}, others {rest}" if (rest := stats.kept - sum(shown.values())) else named


def _quantiles(stats: Stats) -> list[str]:
    if not stats.quantiles:
        return []
    heads = ["min", *(f"{round(100 * q)} %" for q in QUANTILES[1:-1]), "max"]
    lines = ["".join([" " * 12, *(f"{head:>10}" for head in heads)])]
    for name, values in stats.quantiles.items():
        texts = (f"{value:.2f}" if name == "aspect" else str(int(value)) for value in values)
        lines.append("".join([f"{_UNITS[name]:<12}", *(f"{text:>10}" for text in texts)]))
    return lines


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    counted = pc.value_counts(table[column].drop_null()).to_pylist()
    return {entry["values"]: entry["counts"] for entry in counted}
