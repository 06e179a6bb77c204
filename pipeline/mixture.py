"""Which sample of which source comes when: one or several snapshots mixed by weight, memory O(1).

Called by the loader and its workers. Each source keeps the order of `pipeline.order`; a mixture
only says whose turn it is. Slot k of a lane, k = (epoch · steps + step) · samples a step + i,
belongs to pattern[k mod 1000], where the pattern of a lane is a keyed permutation of each source's
share of a thousand slots (its weight, rounded by largest remainders). So every thousand slots hold
every source exactly so often, and how much of a source was served before any slot is arithmetic:
resuming anywhere costs nothing, and a source's own epoch and place follow from its count.

    source   one snapshot; its samples are numbered 0 … N-1 within it
    epoch    of the mixture: as many samples as all sources hold together, a counter only; each
             source goes through its own epochs, faster or slower, and is never cut short
    global   first_number[source] + number: a sample's number over all sources

A mixture of one source is that source's order itself, epoch by epoch and step by step.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.order import SampleOrder, check_batch, permute
from pipeline.randomness import mix64

Int64 = NDArray[np.int64]

PATTERN_SLOTS = 1000
"""Slots after which a lane's turns repeat: a weight is rounded to a multiple of 1 / 1000."""

_PATTERN, _SOURCE = 3, 4  # what a hash is for: part of its key; order's are 1 and 2


@dataclass(frozen=True)
class Source:
    """A data set of a mixture, and how it is read.

    name: for messages. num_samples: kept rows. chunk, window: as of `SampleOrder`. weight: its
    part in the mixture, in proportion to the others'.
    """

    name: str
    num_samples: int
    chunk: int
    window: int
    weight: float = 1.0


@dataclass(frozen=True)
class Slots:
    """What some lanes serve at one step, lane-major: int64 arrays of one length.

    source: which order. epoch: that source's own. number: the sample within the source. lane,
    place: where it stands in that order. global_numbers: the sample over all sources.
    """

    source: Int64
    epoch: Int64
    number: Int64
    lane: Int64
    place: Int64
    global_numbers: Int64


@dataclass(frozen=True)
class Window:
    """Samples that one lane needs of one source, in the order in which it serves them."""

    source: int
    epoch: int
    numbers: list[int]


def mix_sources(
    sources: Sequence[Source], *, global_batch: int, lanes: int, seed: int
) -> "Mixture":
    """The mixture of some data sets. Raises UsageError, naming the setting, if it cannot be."""
    check_batch(global_batch, lanes)
    batch = global_batch if len(sources) == 1 else lanes
    for source in sources:
        if len(sources) > 1 and source.num_samples < lanes:
            raise UsageError(
                f"{source.name} of loader.mix keeps {source.num_samples} samples, fewer than the "
                f"{lanes} lanes of the sample order; lower loader.lanes or leave it out"
            )
    orders = [
        SampleOrder(
            source.num_samples,
            global_batch=batch,
            lanes=lanes,
            chunk=source.chunk,
            window=source.window,
            seed=source_seed(seed, number),
        )
        for number, source in enumerate(sources)
    ]
    return Mixture(
        orders,
        weights=[source.weight for source in sources],
        global_batch=global_batch,
        lanes=lanes,
        seed=seed,
        names=[source.name for source in sources],
    )


def source_seed(seed: int, source: int) -> int:
    """The seed of a source's order: one data set mixed with itself must not meet itself."""
    return seed if source == 0 else int(mix64(seed, _SOURCE, source) >> np.uint64(1))


class Mixture:
    """The order of all epochs over one or several sources.

    Args:
        orders: of each source. All have `lanes` lanes; a single one has the global batch, of
            several each has a batch of one sample a lane.
        weights: of each source, positive; only their proportions matter.
        global_batch, lanes, seed: as of `SampleOrder`.
        names: of the sources, for messages.

    Attributes:
        first_number: int64 [num_sources + 1], the global number of each source's first sample,
            then the number of all samples. shares: int64 [num_sources], slots of each in a
            thousand.

    Raises UsageError for weights that are not positive, too small, or not one for each source.
    """

    def __init__(
        self,
        orders: Sequence[SampleOrder],
        *,
        weights: Sequence[float],
        global_batch: int,
        lanes: int,
        seed: int,
        names: Sequence[str] = (),
    ) -> None:
        check_batch(global_batch, lanes)
        batch = global_batch if len(orders) == 1 else lanes
        assert all((order.lanes, order.global_batch) == (lanes, batch) for order in orders)
        self.orders = tuple(orders)
        self.global_batch = global_batch
        self.lanes = lanes
        self.seed = seed
        sizes = np.array([order.num_samples for order in orders], dtype=np.int64)
        self.first_number: Int64 = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self.num_samples = int(self.first_number[-1])
        self.num_steps = self.num_samples // global_batch
        self._check_steps()
        self.shares = _shares(weights, names or [f"source {n}" for n in range(len(orders))])
        self._turns = _Turns(self.shares, lanes, seed)
        self._held = [_HeldWindows(order) for order in orders]
        self._per_lane = global_batch // lanes
        self._samples_per_lane = np.array([order.samples_per_lane for order in orders], np.int64)

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes that a rank owns. Raises UsageError when the world does not divide them."""
        return self.orders[0].lanes_of(rank, world_size)

    def slots(self, epoch: int, step: int, lanes: range) -> Slots:
        """What consecutive lanes serve at a step, lane-major: arrays of one row a sample."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of an epoch of {self.num_steps} steps")
        steps_slots = self._slot(epoch, step) + np.arange(self._per_lane, dtype=np.int64)
        lane = np.repeat(np.arange(lanes.start, lanes.stop, dtype=np.int64), self._per_lane)
        source, count = self._turns.at(lane, np.tile(steps_slots, len(lanes)))
        source_epoch, place = np.divmod(count, self._samples_per_lane[source])
        number = np.empty_like(lane)
        for index in range(len(self.orders)):
            its = np.flatnonzero(source == index)
            held = self._held[index]
            number[its] = held.samples_at(source_epoch[its], lane[its], place[its])
        global_numbers = number + self.first_number[source]
        return Slots(source, source_epoch, number, lane, place, global_numbers)

    def windows(
        self, epoch: int, step: int, lanes: range, *, epochs: int | None = None
    ) -> Iterator[Window]:
        """Everything that consecutive lanes serve from a step on, in the order of need.

        A window comes at the step that first takes a sample of it, lanes in their order. Of the
        first windows, what was served before that step is left out; with `epochs`, of the last
        ones what is served after so many epochs. Without, there is no end.
        """
        first = self._slot(epoch, step)
        end = None if epochs is None else self._slot(epochs, 0)
        ways = [
            self._openings(source, lane, first, end)
            for lane in lanes
            for source in range(len(self.orders))
        ]
        for _, lane, _, source, count in heapq.merge(*ways):
            yield self._window(source, lane, count, end)

    def replacements(self, source: int, epoch: int, lane: int, place: int) -> Iterator[int]:
        """What may stand in for a slot's sample, in turn, all of the same source."""
        return self.orders[source].replacements(epoch, lane, place)

    def _slot(self, epoch: int, step: int) -> int:
        """The first slot of a step, in every lane."""
        return (epoch * self.num_steps + step) * self._per_lane

    def _openings(
        self, source: int, lane: int, first: int, end: int | None
    ) -> Iterator[tuple[int, int, int, int, int]]:
        """(step, lane, slot, source, count) at which a lane begins each window of a source."""
        order = self.orders[source]
        size = order.window * order.chunk
        count = self._turns.count_before(source, lane, first)
        slot = self._turns.slot_of(source, lane, count)
        while end is None or slot < end:
            yield slot // self._per_lane, lane, slot, source, count
            place = count % order.samples_per_lane
            count += min(size - place % size, order.samples_per_lane - place)
            slot = self._turns.slot_of(source, lane, count)

    def _window(self, source: int, lane: int, count: int, end: int | None) -> Window:
        """What a lane serves of a source's window from its count on, and before slot `end`."""
        order = self.orders[source]
        epoch, place = divmod(count, order.samples_per_lane)
        served = place % (order.window * order.chunk)
        numbers = order.window_of(epoch, lane, place)[served:].tolist()
        if end is not None:
            numbers = numbers[: self._turns.count_before(source, lane, end) - count]
        return Window(source, epoch, numbers)

    def _check_steps(self) -> None:
        if not self.num_steps:
            raise UsageError(
                f"loader.mix keeps {self.num_samples} samples, fewer than one global batch of "
                f"{self.global_batch}; lower loader.global_batch or add images"
            )


class _HeldWindows:
    """The window that each lane was in last, for its next steps: 8 bytes for every sample."""

    def __init__(self, order: SampleOrder) -> None:
        self._order = order
        self._size = order.window * order.chunk
        self._last: dict[int, tuple[int, int, Int64]] = {}  # by lane: epoch, window, its samples

    def samples_at(self, epoch: Int64, lane: Int64, place: Int64) -> Int64:
        """`SampleOrder.sample_at`, cheap where the places of a window stand side by side."""
        window, offset = np.divmod(place, self._size)
        changes = (np.diff(epoch) != 0) | (np.diff(lane) != 0) | (np.diff(window) != 0)
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(place)]
        samples = np.empty_like(place)
        for start, end in pairwise(bounds):
            run = slice(start, end)
            if start < end:
                found = self._samples(int(epoch[start]), int(lane[start]), int(window[start]))
                samples[run] = found[offset[run]]
        return samples

    def _samples(self, epoch: int, lane: int, window: int) -> Int64:
        held = self._last.get(lane)
        if held is None or held[:2] != (epoch, window):
            samples = self._order.window_of(epoch, lane, window * self._size)
            held = self._last[lane] = (epoch, window, samples)
        return held[2]


class _Turns:
    """Whose turn each slot of a lane is, and the way back from a source's count to its slot.

    Tables of int16 [lanes, 1000]; everything else is arithmetic.
    """

    def __init__(self, shares: Int64, lanes: int, seed: int) -> None:
        whose = np.repeat(np.arange(len(shares), dtype=np.int16), shares)
        self._shares = shares
        self._starts: Int64 = np.cumsum(shares) - shares
        if len(shares) == 1:  # nothing to shuffle
            slots = np.arange(PATTERN_SLOTS, dtype=np.int16)
            self._slots = self._nths = np.broadcast_to(slots, (lanes, PATTERN_SLOTS))
            self._sources = np.zeros_like(self._slots)
            return
        self._sources = whose[_shuffles(lanes, seed)]
        # Row by row: the slots of source 0 ascending, then those of source 1, …
        self._slots = np.argsort(self._sources, axis=1, kind="stable").astype(np.int16)
        nths = np.arange(PATTERN_SLOTS) - self._starts[whose]
        self._nths = np.empty_like(self._slots)
        np.put_along_axis(self._nths, self._slots.astype(np.int64), nths.astype(np.int16), axis=1)

    def at(self, lane: Int64, slot: Int64) -> tuple[Int64, Int64]:
        """The source whose turn a slot is, and how many slots of its lane it had before."""
        turn, offset = np.divmod(slot, PATTERN_SLOTS)
        source = self._sources[lane, offset].astype(np.int64)
        return source, turn * self._shares[source] + self._nths[lane, offset]

    def count_before(self, source: int, lane: int, slot: int) -> int:
        """How many slots before this one are the source's."""
        turn, offset = divmod(slot, PATTERN_SLOTS)
        within = np.searchsorted(self._slots_of(source, lane), offset)
        return turn * int(self._shares[source]) + int(within)

    def slot_of(self, source: int, lane: int, count: int) -> int:
        """The source's slot with so many of its own before."""
        turn, nth = divmod(count, int(self._shares[source]))
        return turn * PATTERN_SLOTS + int(self._slots_of(source, lane)[nth])

    def _slots_of(self, source: int, lane: int) -> NDArray[np.int16]:
        start = self._starts[source]
        return self._slots[lane, start : start + self._shares[source]]


def _shuffles(lanes: int, seed: int) -> Int64:
    """A keyed permutation of 0 … 999 for every lane: int64 [lanes, 1000]."""
    lane, slot = np.divmod(np.arange(lanes * PATTERN_SLOTS, dtype=np.int64), PATTERN_SLOTS)
    sizes = np.full_like(slot, PATTERN_SLOTS)
    return permute(slot, sizes, mix64(seed, _PATTERN, lane)).reshape(lanes, PATTERN_SLOTS)


def _shares(weights: Sequence[float], names: Sequence[str]) -> Int64:
    """Slots of each source in a thousand, by largest remainders; equal ones go to the first."""
    if len(weights) != len(names) or not weights:
        raise UsageError(f"loader.mix has {len(weights)} weights for {len(names)} data sets")
    for weight, name in zip(weights, names, strict=True):
        if not (isfinite(weight) and weight > 0):
            raise UsageError(
                f"the weight of {name} in loader.mix is {weight}; it must be a positive number"
            )
    exact = [Fraction(weight) for weight in weights]  # so that equal remainders are equal
    ideal = [weight * PATTERN_SLOTS / sum(exact) for weight in exact]
    shares = np.array([int(share) for share in ideal], dtype=np.int64)
    by_remainder = sorted(range(len(ideal)), key=lambda index: int(ideal[index]) - ideal[index])
    shares[by_remainder[: PATTERN_SLOTS - int(shares.sum())]] += 1
    for share, weight, name in zip(shares, weights, names, strict=True):
        if share == 0:
            raise UsageError(
                f"the weight {weight} of {name} in loader.mix is less than a thousandth of the "
                f"sum of all weights, {sum(weights):g}; raise it, or leave the data set out"
            )
    return shares
