"""Which sample comes when: a pure function (seed, epoch, position) -> sample number, memory O(1).

Called by mixture. Nothing is shuffled or materialised: every permutation is a keyed Feistel
network over the smallest even-bit domain that holds its n values, walked along its cycles until it
lands below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). So the order of
ten billion samples costs what the order of ten costs, and the state of a run is two integers
(epoch, step).

    sample   the number of a kept row of the snapshot, 0 … N-1, shard after shard
    chunk    `chunk` consecutive samples: one ranged read
    position where a sample stands in an epoch's sequence of permuted chunks
    lane     an equal span of positions; a global batch takes global_batch / lanes samples of each
    window   `window` chunks' worth of a lane's positions, permuted among themselves

A batch is lane-major and a rank owns consecutive lanes, so the batches of the ranks, concatenated,
are the batch of a world of one: the world size never changes what is trained on.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.randomness import mix64, mix64_in_place

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

_ROUNDS = 6  # 4 pass for indistinguishable in theory; small domains mix better with a few more
_SALTS = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_CHUNKS, _WINDOW = 1, 2  # what a permutation is for: part of its key


class SampleOrder:
    """The order of all epochs over `num_samples` samples.

    Args:
        num_samples: N, kept rows of the snapshot.
        global_batch: G, samples a step over all ranks. Fewer than G samples are left out of an
            epoch, and others in every epoch.
        lanes: a divisor of G; every world size that may ever train must divide it.
        chunk: R, consecutive samples of one read.
        window: chunks whose samples are mixed inside a lane.
        seed: two runs with one seed see the same batches.

    Raises UsageError for sizes that do not fit each other.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch: int,
        lanes: int,
        chunk: int,
        window: int,
        seed: int,
    ) -> None:
        _check_sizes(num_samples, global_batch, lanes, chunk, window)
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.lanes = lanes
        self.chunk = chunk
        self.window = window
        self.seed = seed
        self.num_steps = num_samples // global_batch
        self.num_chunks = -(-num_samples // chunk)
        self.samples_per_lane = self.num_steps * (global_batch // lanes)

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> Int64:
        """Sample numbers of one rank at one step, lane-major: int64 [global_batch / world_size]."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of an epoch of {self.num_steps} steps")
        lanes = self.lanes_of(rank, world_size)
        per_lane = self.global_batch // self.lanes
        lane = np.repeat(np.arange(lanes.start, lanes.stop, dtype=np.int64), per_lane)
        place = np.tile(
            np.arange(step * per_lane, (step + 1) * per_lane, dtype=np.int64), len(lanes)
        )
        return self.sample_at(epoch, lane, place)

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes that a rank owns. Raises UsageError when the world does not divide them."""
        check_world_size(self.lanes, world_size)
        per_rank = self.lanes // world_size
        return range(rank * per_rank, (rank + 1) * per_rank)

    def window_of(self, epoch: int, lane: int, place: int) -> Int64:
        """All samples of the window that holds a lane's place, in the order they are served.

        What `sample_at` says of each, for a tenth of its time: neighbours share their chunks.
        """
        size = self.window * self.chunk
        window = place // size
        start = window * size
        length = min(size, self.samples_per_lane - start)
        samples = self._consecutive(epoch, lane * self.samples_per_lane + start, length)
        return samples[_permutation(length, _key(self.seed, epoch, _WINDOW, lane, window))]

    def replacements(self, epoch: int, lane: int, place: int) -> Iterator[int]:
        """What may stand in for the sample at a place, in turn: a pure function, like the order.

        First the rest of its window, round the window's end, then the lane's following windows,
        round the lane's end.
        """
        size = self.window * self.chunk
        window, here = self.window_of(epoch, lane, place).tolist(), place % size
        yield from window[here + 1 :] + window[:here]
        start = place - here
        for other in (*range(start + size, self.samples_per_lane, size), *range(0, start, size)):
            yield from self.window_of(epoch, lane, other).tolist()

    def sample_at(self, epoch: int | Int64, lane: Int64, place: Int64) -> Int64:
        """The sample at `place` (0 … samples_per_lane - 1) of `lane`, elementwise."""
        size = self.window * self.chunk
        window, offset = np.divmod(place, size)
        length = np.minimum(size, self.samples_per_lane - window * size)
        key = _key(self.seed, epoch, _WINDOW, lane, window)
        shuffled = window * size + permute(offset, length, key)
        return self._sample_at_position(epoch, lane * self.samples_per_lane + shuffled)

    def _sample_at_position(self, epoch: int | Int64, position: Int64) -> Int64:
        """Walk the sequence of permuted chunks, in which one chunk may be short."""
        epochs, which = np.unique(np.atleast_1d(epoch), return_inverse=True)
        keys = _key(self.seed, epochs, _CHUNKS)
        short_start = self._slots_of_last_chunk(keys)[which] * self.chunk
        slot, offset = self._slot_and_offset(position, short_start)
        chunk = permute(
            slot, np.full_like(slot, self.num_chunks), np.broadcast_to(keys[which], slot.shape)
        )
        return chunk * self.chunk + offset

    def _consecutive(self, epoch: int, position: int, count: int) -> Int64:
        """The samples at so many positions, in their order; each chunk is looked up once."""
        short_start = _slot_of_last_chunk(self.seed, epoch, self.num_chunks) * self.chunk
        positions = np.arange(position, position + count, dtype=np.int64)
        slot, offset = self._slot_and_offset(positions, short_start)
        slots = np.arange(slot[0], slot[-1] + 1, dtype=np.int64)
        sizes = np.full_like(slots, self.num_chunks)
        key = np.broadcast_to(_key(self.seed, epoch, _CHUNKS), slots.shape)
        chunks = permute(slots, sizes, key)
        samples: Int64 = chunks[slot - slot[0]] * self.chunk + offset
        return samples

    def _slot_and_offset(self, position: Int64, short_start: int | Int64) -> tuple[Int64, Int64]:
        """The place of a position among the chunks, and in its chunk: one of them may be short."""
        short = self.num_samples - (self.num_chunks - 1) * self.chunk
        after = position >= short_start + short
        virtual: Int64 = position + after * (self.chunk - short)
        slot, offset = np.divmod(virtual, self.chunk)
        return slot, offset

    def _slots_of_last_chunk(self, keys: UInt64) -> Int64:
        """Where the last chunk, the one that may be short, stands: by the key of each epoch."""
        sizes = np.full(keys.shape, self.num_chunks, dtype=np.int64)
        return _unpermute(sizes - 1, sizes, keys)


@dataclass(frozen=True)
class OrderSizes:
    """The constants of an order: resolved once, at first launch, and kept by the checkpoint."""

    lanes: int
    chunk: int
    window: int


def resolve_sizes(
    *,
    global_batch: int,
    world_size: int,
    mean_sample_bytes: float,
    num_samples: int,
    budget_bytes: int,
    lanes: int = 0,
    chunk: int = 0,
    window: int = 0,
    chunk_bytes: int = 6 << 20,
) -> OrderSizes:
    """Fill in the sizes left at 0.

    lanes: the largest divisor of the global batch up to max(64, world) that the world size divides.
    window: 4 chunks. chunk: so many mean samples as make about `chunk_bytes`, but no more than
    leave every lane eight chunks of a small data set, nor than keep what a rank reads ahead
    (window + 1 chunks for each of its lanes) within `budget_bytes`.
    """
    lanes = lanes or _default_lanes(global_batch, world_size)
    window = window or 4
    if not chunk:
        ahead = lanes / world_size * (window + 1) * max(1.0, mean_sample_bytes)
        fitting = min(chunk_bytes / max(1.0, mean_sample_bytes), budget_bytes / ahead)
        chunk = max(1, min(int(fitting), num_samples // (8 * lanes)))
    return OrderSizes(lanes=lanes, chunk=chunk, window=window)


def check_world_size(lanes: int, world_size: int) -> None:
    """Raise UsageError when `lanes` cannot be dealt evenly to the ranks."""
    if lanes % world_size:
        fitting = [n for n in range(1, lanes + 1) if lanes % n == 0]
        raise UsageError(
            f"a world of {world_size} ranks does not divide the {lanes} lanes of the sample order; "
            f"start {_either(fitting)} ranks, or a new run with loader.lanes set to a multiple "
            f"of {world_size}"
        )


def check_batch(global_batch: int, lanes: int) -> None:
    """Raise UsageError when a global batch cannot be dealt evenly to the lanes."""
    _check_positive(global_batch=global_batch, lanes=lanes)
    if global_batch % lanes:
        raise UsageError(
            f"loader.lanes={lanes} does not divide loader.global_batch={global_batch}; "
            f"choose a divisor, or 0 to have it chosen"
        )


def _default_lanes(global_batch: int, world_size: int) -> int:
    for lanes in range(min(global_batch, max(64, world_size)), 0, -1):
        if global_batch % lanes == 0 and lanes % world_size == 0:
            return lanes
    raise UsageError(
        f"the global batch of {global_batch} does not divide over {world_size} ranks; "
        f"set loader.global_batch to a multiple of {world_size}"
    )


def _check_sizes(num_samples: int, global_batch: int, lanes: int, chunk: int, window: int) -> None:
    _check_positive(chunk=chunk, window=window)
    check_batch(global_batch, lanes)
    if num_samples < global_batch:
        raise UsageError(
            f"the data set keeps {num_samples} samples, fewer than one global batch of "
            f"{global_batch}; lower loader.global_batch or add images"
        )


def _check_positive(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise UsageError(f"loader.{name} is {value}; it must be at least 1")


def _either(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if numbers[1:] else "") + str(numbers[-1])


def _key(*parts: int | Int64) -> UInt64:
    """A 64-bit key for each element of the parts."""
    return np.atleast_1d(mix64(*parts))


@functools.lru_cache(maxsize=64)
def _slot_of_last_chunk(seed: int, epoch: int, num_chunks: int) -> int:
    """`SampleOrder._slots_of_last_chunk` of one epoch."""
    size = np.array([num_chunks], dtype=np.int64)
    return int(_unpermute(size - 1, size, _key(seed, epoch, _CHUNKS))[0])


def _permutation(size: int, key: UInt64) -> Int64:
    """`permute` of 0 … size-1 with one key: the network is applied to its domain once."""
    half = _half_bits(np.array([size], dtype=np.int64))
    domain = np.arange(1 << 2 * int(half[0]), dtype=np.uint64)
    following = _feistel(domain, half, key, range(_ROUNDS)).astype(np.int64)
    out = following[:size]
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = following[out[outside]]  # `out` is its head, never looked up again
    return out


def permute(value: Int64, size: Int64, key: UInt64) -> Int64:
    """Keyed permutation of 0 … size-1, elementwise in value, size and key, all of one shape."""
    return _walk(value, size, key, range(_ROUNDS))


def _unpermute(value: Int64, size: Int64, key: UInt64) -> Int64:
    """The inverse of `permute`."""
    return _walk(value, size, key, range(_ROUNDS - 1, -1, -1))


def _walk(value: Int64, size: Int64, key: UInt64, rounds: range) -> Int64:
    """Apply the network until every value is below its size again (≤ 4 turns on average)."""
    half = _half_bits(size)
    out = _feistel(value.astype(np.uint64), half, key, rounds)
    outside = np.flatnonzero(out >= size.astype(np.uint64))
    while outside.size:
        out[outside] = _feistel(out[outside], half[outside], key[outside], rounds)
        outside = outside[out[outside] >= size[outside].astype(np.uint64)]
    return out.astype(np.int64)


def _half_bits(size: Int64) -> UInt64:
    """Bits of one half of the smallest Feistel domain 2^(2 half) that holds `size` values."""
    bits = np.ceil(np.log2(np.maximum(size, 2).astype(np.float64))).astype(np.uint64)
    return (bits + np.uint64(1)) >> np.uint64(1)


def _feistel(value: UInt64, half: UInt64, key: UInt64, rounds: range) -> UInt64:
    """A balanced Feistel network; running its rounds backwards undoes it."""
    mask: UInt64 = (np.uint64(1) << half) - np.uint64(1)
    left: UInt64 = value >> half
    right: UInt64 = value & mask
    backwards = rounds.step < 0
    for number in rounds:
        salted = key + _SALTS[number]
        if backwards:
            left, right = right ^ (mix64_in_place(left + salted) & mask), left
        else:
            left, right = right, left ^ (mix64_in_place(right + salted) & mask)
    return (left << half) | right
