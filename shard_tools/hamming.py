"""All pairs of 64-bit hashes that differ in at most d bits, without comparing all with all.

Pigeonhole: of b blocks that the bits are cut into, d different bits leave at least b - d equal. So
for each choice of b - d blocks the hashes are sorted by these, and only those that agree there are
compared: with d = 3 and b = 5, ten tables with keys of about 25 bits. No pair is missed, whatever
the hashes look like. (Manku, Jain and Das Sarma, "Detecting Near-Duplicates for Web Crawling",
WWW 2007; they keep the tables to look up new hashes, here each is sorted, scanned and forgotten.)

Hashes of real images are not random: where many agree on a key, comparing them would again be n².
Such buckets are joined the same way by the bits that are left, and so on, so that no hash is ever
compared with more than `SCAN` others of its bucket in one table. And some bits differ seldom: they
are dealt out so that each block gets its share of those that do.

Everything is numpy on whole arrays, which sorts and counts without the interpreter's lock.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt

from pipeline.errors import UsageError

HASH_BITS = 64
MAX_DISTANCE = 8  # further apart a difference hash says little, and tables become many
SCAN = 256  # hashes of a bucket that one is compared with

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Pairs = tuple[Hashes, Hashes]

_PIECE = 2**15  # hashes permuted at once: they stay in the processor's cache
_SAMPLE = 10_000  # hashes that are looked at to learn which bits differ
_MOST_BLOCKS = 6  # more than the distance
# What one hash costs a table, one comparison, and a table itself, in ns; they only choose b.
_HASH_NS, _COMPARISON_NS, _TABLE_NS = 50, 10, 700_000


class _Permutation:
    """Moves bits: bit `order[k]` of a hash becomes bit k. A byte at a time, by table."""

    def __init__(self, order: Sequence[int]) -> None:
        self.order = tuple(order)
        self._bytes = np.zeros((HASH_BITS // 8, 256), np.uint64)
        values = np.arange(256, dtype=np.uint64)
        for target, source in enumerate(order):
            bit = (values >> np.uint64(source % 8)) & np.uint64(1)
            self._bytes[source // 8] |= bit << np.uint64(target)

    def __call__(self, hashes: Hashes) -> Hashes:
        result = np.empty_like(hashes)
        for start in range(0, len(hashes), _PIECE):
            piece = hashes[start : start + _PIECE]
            moved = self._bytes[0][piece & np.uint64(255)]
            for number in range(1, len(self._bytes)):
                byte = (piece >> np.uint64(8 * number)) & np.uint64(255)
                moved |= self._bytes[number][byte]
            result[start : start + _PIECE] = moved
        return result

    def inverse(self) -> "_Permutation":
        return _Permutation([int(place) for place in np.argsort(self.order)])


@dataclass(frozen=True)
class _Table:
    """One choice of blocks of the low `bits` bits of hashes that agree on the others."""

    bits: int
    blocks: tuple[tuple[int, ...], ...]  # the bits of each
    chosen: tuple[int, ...]  # the blocks that must be equal, ascending

    @property
    def rest(self) -> int:
        """Bits that are not chosen."""
        return self.bits - sum(len(self.blocks[number]) for number in self.chosen)

    def permutation(self) -> _Permutation:
        """Moves the chosen blocks up, right below the bits that are in no block."""
        chosen = [bit for number in self.chosen for bit in self.blocks[number]]
        others = sorted(set(range(self.bits)) - set(chosen))
        return _Permutation([*others, *chosen, *range(self.bits, HASH_BITS)])

    def is_first_for(self, pairs: Pairs) -> npt.NDArray[np.bool_]:
        """Whether a pair that agrees on the chosen blocks agrees on none before: it is met once."""
        difference = pairs[0] ^ pairs[1]
        masks = np.array([sum(1 << bit for bit in block) for block in self.blocks], np.uint64)
        is_equal = (difference[:, None] & masks) == 0
        is_early = is_equal & (np.cumsum(is_equal, axis=1) <= len(self.chosen))
        result: npt.NDArray[np.bool_] = is_early[:, self.chosen].all(axis=1)
        return result


def near_pairs(
    hashes: Hashes, distance: int, *, max_pairs: int, threads: int = 1
) -> tuple[Numbers, Numbers]:
    """Every pair of hashes at most `distance` bits apart, once.

    Args:
        hashes: uint64 [N], ascending, distinct. distance: 0 … MAX_DISTANCE.

    Returns: int64 [P] and int64 [P], the places of both in `hashes`, the lower first; the pairs are
    in the same order in every run. Memory: about 32 bytes a hash and thread, 32 a pair.

    Raises UsageError if there are more than `max_pairs`.
    """
    tables = _tables(hashes, HASH_BITS, distance) if distance else []
    found: list[Pairs] = []
    num_found = 0
    with ThreadPoolExecutor(threads) as workers:
        tasks = [workers.submit(_of_table, hashes, t, distance, max_pairs) for t in tables]
        try:
            for task in tasks:
                found.append(task.result())
                num_found += len(found[-1][0])
                _refuse_too_many(num_found, max_pairs, distance)
        except UsageError:
            workers.shutdown(cancel_futures=True)
            raise
    first, second = _concatenated(found)
    del found
    places = np.searchsorted(hashes, first), np.searchsorted(hashes, second)
    return np.minimum(*places), np.maximum(*places)


def _tables(ordered: Hashes, bits: int, distance: int) -> list[_Table]:
    """The cheapest set of tables for hashes in buckets that agree on all but the low `bits`."""
    shares, bucket = _differing(ordered, bits)
    telling_bits = _entropy(shares).sum()

    def cost_ns(num_blocks: int) -> float:
        width = telling_bits * (num_blocks - distance) / num_blocks
        comparisons = min(bucket / 2**width, SCAN)
        each = _TABLE_NS + len(ordered) * (_HASH_NS + _COMPARISON_NS * comparisons)
        return float(comb(num_blocks, distance) * each)

    most = min(distance + _MOST_BLOCKS, bits)
    num_blocks = min(range(distance + 1, most + 1), key=cost_ns)
    dealt = np.argsort(-_entropy(shares), kind="stable").tolist()
    blocks = tuple(tuple(dealt[number::num_blocks]) for number in range(num_blocks))
    choices = combinations(range(num_blocks), num_blocks - distance)
    return [_Table(bits, blocks, chosen) for chosen in choices]


def _differing(ordered: Hashes, bits: int) -> tuple[npt.NDArray[np.float64], float]:
    """In which share of the hashes each low bit differs from the bucket's first one; mean size."""
    if not len(ordered):
        return np.zeros(bits), 0.0
    is_first = np.ones(len(ordered), np.bool_)
    is_first[1:] = ~_agree(ordered[1:], ordered[:-1], bits)
    firsts = np.flatnonzero(is_first)
    sample = np.arange(0, len(ordered), -(-len(ordered) // _SAMPLE))
    bucket = np.searchsorted(firsts, sample, side="right") - 1
    difference = ordered[sample] ^ ordered[firsts[bucket]]
    single = np.uint64(1) << np.arange(bits, dtype=np.uint64)
    shares = ((difference[:, None] & single) != 0).mean(axis=0)
    return shares, len(ordered) / len(firsts)


def _entropy(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of coins that fall so, in bits."""
    inner = np.clip(shares, 1e-12, 1 - 1e-12)
    result: npt.NDArray[np.float64] = -inner * np.log2(inner) - (1 - inner) * np.log2(1 - inner)
    return result


def _of_table(hashes: Hashes, table: _Table, distance: int, max_pairs: int) -> Pairs:
    """All pairs whose first table this is."""
    found: list[Pairs] = []
    num_found = 0
    for pairs in _join(hashes, table, distance):
        found.append(pairs)
        num_found += len(pairs[0])
        _refuse_too_many(num_found, max_pairs, distance)
    return _concatenated(found)


def _join(hashes: Hashes, table: _Table, distance: int) -> Iterator[Pairs]:
    """The pairs that agree on the table's chosen blocks and all higher bits, and on no earlier."""
    permutation = table.permutation()
    restore = permutation.inverse()
    for pairs in _join_permuted(permutation(hashes), table.rest, distance):
        if len(pairs[0]):
            first, second = restore(pairs[0]), restore(pairs[1])
            is_first = table.is_first_for((first, second))
            yield first[is_first], second[is_first]


def _join_permuted(hashes: Hashes, rest: int, distance: int) -> Iterator[Pairs]:
    """The pairs that agree on all but the `rest` lowest bits. Sorts the hashes in place."""
    hashes.sort()
    is_large = _in_large_bucket(hashes, rest)
    if is_large is None:
        yield from _scan(hashes, rest, distance)
        return
    large, small = hashes[is_large], hashes[~is_large]
    del hashes, is_large
    yield from _scan(small, rest, distance)
    for table in _tables(large, rest, distance):
        yield from _join(large, table, distance)


def _in_large_bucket(ordered: Hashes, rest: int) -> npt.NDArray[np.bool_] | None:
    """Which hashes lie in buckets of more than SCAN, None if none does."""
    if len(ordered) <= SCAN or 2**rest <= SCAN:
        return None
    begins = np.flatnonzero(_agree(ordered[:-SCAN], ordered[SCAN:], rest))
    if not len(begins):
        return None
    edges = np.zeros(len(ordered) + 1, np.int32)
    np.add.at(edges, begins, 1)
    np.add.at(edges, begins + SCAN + 1, -1)
    return np.cumsum(edges[:-1]) > 0


def _scan(ordered: Hashes, rest: int, distance: int) -> Iterator[Pairs]:
    """Compare each hash with those behind it in its bucket, all at offset 1, then at 2, …"""
    at = np.flatnonzero(_agree(ordered[1:], ordered[:-1], rest))
    offset = 1
    while len(at):
        first, second = ordered[at], ordered[at + offset]
        is_near = np.bitwise_count(first ^ second) <= distance
        yield first[is_near], second[is_near]
        offset += 1
        at = at[: np.searchsorted(at, len(ordered) - offset)]
        at = at[_agree(ordered[at], ordered[at + offset], rest)]


def _agree(first: Hashes, second: Hashes, rest: int) -> npt.NDArray[np.bool_]:
    """Whether two hashes are in one bucket: all but the `rest` lowest bits are equal."""
    difference = first ^ second
    difference >>= np.uint64(rest)
    result: npt.NDArray[np.bool_] = difference == 0
    return result


def _concatenated(found: Sequence[Pairs]) -> Pairs:
    if not found:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    first, second = zip(*found, strict=True)
    return np.concatenate(first), np.concatenate(second)


def _refuse_too_many(num_pairs: int, max_pairs: int, distance: int) -> None:
    if num_pairs > max_pairs:
        raise UsageError(
            f"more than {max_pairs} pairs of hashes are within {distance} bits: the memory allowed "
            "does not hold them; allow more, or choose a smaller distance"
        )
