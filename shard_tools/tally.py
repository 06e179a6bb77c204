"""Quantiles, histograms and counts by name over billions of values, in bounded memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
EXACT_UP_TO = 1_000_000  # values; of more, every second, fourth, … is looked at
MAX_NAMES = 100_000

Numbers = npt.NDArray[np.int64]
Values = npt.NDArray[Any]  # integers or floats


class Spread:
    """Quantiles in bounded memory: exact for the first million values, then of every 2nd, 4th, …"""

    def __init__(self, exact_up_to: int = EXACT_UP_TO) -> None:
        self._limit = exact_up_to
        self._step = 1
        self._skip = 0  # values to pass over before the next one that counts
        self._kept: Values = np.empty(0, np.int64)

    def add(self, values: Values) -> None:
        """Take note of more values."""
        chosen = values[self._skip :: self._step]
        self._skip = (self._skip - len(values)) % self._step
        self._kept = np.concatenate([self._kept, chosen]) if len(self._kept) else chosen.copy()
        while len(self._kept) > self._limit:
            self._skip += self._step * (len(self._kept) % 2)
            self._kept = self._kept[::2]
            self._step *= 2

    def quantiles(self) -> list[float]:
        """The values at QUANTILES, each of them one that occurs; empty if there is none."""
        if not len(self._kept):
            return []
        found: list[float] = np.quantile(self._kept, QUANTILES, method="inverted_cdf").tolist()
        return found


@dataclass
class Histogram:
    """Counts in bins of equal ratio: bin i holds the values in [edges[i], edges[i + 1])."""

    edges: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


class LogBins:
    """Counts positive values in `per_octave` bins a factor of two, in which 1 is the edge of a bin.

    With `centred`, 1 is the middle of a bin (on the logarithmic scale).
    """

    def __init__(self, per_octave: int, *, centred: bool = False) -> None:
        self._per_octave = per_octave
        self._shift = 0.5 if centred else 0.0
        self._counts: dict[int, int] = {}

    def add(self, values: Values) -> None:
        """Count more values; those that are not positive have no bin."""
        positive = values[values > 0].astype(np.float64)
        bins = np.floor(np.log2(positive) * self._per_octave + self._shift).astype(np.int64)
        for number, count in zip(*np.unique(bins, return_counts=True), strict=True):
            self._counts[int(number)] = self._counts.get(int(number), 0) + int(count)

    def histogram(self) -> Histogram:
        """All bins from the first to the last that is not empty."""
        if not self._counts:
            return Histogram()
        first, last = min(self._counts), max(self._counts)
        edges = [2 ** ((n - self._shift) / self._per_octave) for n in range(first, last + 2)]
        return Histogram(edges, [self._counts.get(n, 0) for n in range(first, last + 1)])


class Tally:
    """Counts by name, of one or more kinds at once, for at most `max_names` names.

    When there are more, the rarer half is dropped and counted under `others`. So all sums are
    exact, and so are the counts of names that were never among the rarer half; a name that comes
    seldom and everywhere may lose some of its counts to `others`.
    """

    def __init__(self, num_kinds: int = 1, *, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._counts: dict[str, list[int]] = {}  # by kind; an array for each would take ten times
        self.others = [0] * num_kinds
        self.is_exact = True

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, name: str, count: int, kind: int = 0) -> None:
        """Count a name `count` times more."""
        counts = self._counts.get(name)
        if counts is None:
            if len(self._counts) == self._max_names:
                self._drop_rare()
            counts = self._counts[name] = [0] * len(self.others)
        counts[kind] += count

    def merge(self, other: "Tally") -> None:
        """Count all that another one counted."""
        for name, counts in other._counts.items():
            for kind, count in enumerate(counts):
                self.add(name, count, kind)
        self.others = _sum(self.others, other.others)

    def rename(self, names: dict[str, str]) -> None:
        """Give names new ones; those that become the same are counted together."""
        before, self._counts = self._counts, {}
        for name, counts in before.items():
            self._counts[names[name]] = _sum(self._counts.get(names[name], ()), counts)

    def names(self) -> list[str]:
        """All names that are counted."""
        return list(self._counts)

    def top(self, num_names: int) -> tuple[dict[str, list[int]], list[int]]:
        """The most frequent names with their counts by kind, and the counts of all others."""
        ordered = self._by_count()
        rest = self.others
        for name in ordered[num_names:]:
            rest = _sum(rest, self._counts[name])
        return {name: self._counts[name] for name in ordered[:num_names]}, rest

    def _by_count(self) -> list[str]:
        return sorted(self._counts, key=lambda name: (-sum(self._counts[name]), name))

    def _drop_rare(self) -> None:
        names, counts = list(self._counts), np.array(list(self._counts.values()))
        rare = np.argsort(-counts.sum(axis=1), kind="stable")[self._max_names // 2 :]
        self.others = _sum(self.others, counts[rare].sum(axis=0).tolist())
        for place in rare.tolist():
            del self._counts[names[place]]
        self.is_exact = False


def _sum(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)] if one else list(other)
