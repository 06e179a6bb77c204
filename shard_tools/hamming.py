"""All pairs of 64-bit hashes that differ in at most d bits, without comparing all with all.

Pigeonhole: of b blocks that the bits are cut into, d different bits leave at least b - d equal. So
for each choice of b - d blocks the hashes are sorted by these, and only those that agree there are
compared: with d = 3 and b = 5, ten tables with keys of about 25 bits. No pair is missed, whatever
the hashes look like. (Manku, Jain and Das Sarma, "Detecting Near-Duplicates for Web Crawling",
WWW 2007; they keep the tables to look up new hashes, here each is sorted, scanned and forgotten.)

Hashes of real images are not random: where many agree on a key, comparing them would again be n².
Such buckets are joined the same way by the bits that are left, and so on, so that no hash is ever
compared with more than `SCAN` others of its bucket in one table.

Everything is numpy on whole arrays, which sorts and counts without the interpreter's lock.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, pairwise
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

_PIECE = 2**16  # hashes permuted at once: they stay in the processor's cache
_MOST_BLOCKS = 6  # more than the distance
# What one hash costs a table, one comparison, and a table itself, in ns; they only choose b.
_HASH_NS, _COMPARISON_NS, _TABLE_NS = 50, 10, 200_000


@dataclass(frozen=True)
class _Table:
    """One choice of blocks: the low `bits` bits of a hash, cut into blocks, some of them chosen."""

    bits: int
    blocks: tuple[tuple[int, int], ...]  # (lowest bit, width), from the high end down
    chosen: tuple[int, ...]  # numbers of the blocks that must be equal

    @property
    def rest(self) -> int:
        """Bits that are not chosen."""
        return self.bits - sum(self.blocks[number][1] for number in self.chosen)

    def permuted(self, hashes: Hashes) -> Hashes:
        """The hashes with the chosen blocks moved up, right below the bits that are no part."""
        return _in_pieces(hashes, lambda piece: _move(piece, self._moves()))

    def restored(self, hashes: Hashes) -> Hashes:
        """The inverse of `permuted`."""
        back = [(target, low, width) for low, target, width in self._moves()]
        return _move(hashes, back)

    def is_first_for(self, hashes: Pairs) -> npt.NDArray[np.bool_]:
        """Whether a pair that agrees on the chosen blocks agrees on none before: it is met once."""
        difference = hashes[0] ^ hashes[1]
        masks = np.array([((1 << width) - 1) << low for low, width in self.blocks], np.uint64)
        is_equal = (difference[:, None] & masks) == 0
        is_early = is_equal & (np.cumsum(is_equal, axis=1) <= len(self.chosen))
        result: npt.NDArray[np.bool_] = is_early[:, self.chosen].all(axis=1)
        return result

    def _moves(self) -> list[tuple[int, int, int]]:
        """(from bit, to bit, width) for every part of a hash."""
        others = [number for number in range(len(self.blocks)) if number not in self.chosen]
        moves, target = [], self.bits
        for low, width in (self.blocks[number] for number in (*self.chosen, *others)):
            target -= width
            moves.append((low, target, width))
        above = HASH_BITS - self.bits
        return [*moves, (self.bits, self.bits, above)] if above else moves


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
    tables = _tables(len(hashes), len(hashes), HASH_BITS, distance) if distance else []
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


def _tables(num_hashes: int, bucket: int, bits: int, distance: int) -> list[_Table]:
    """The cheapest set of tables for hashes in buckets of `bucket` that share all higher bits."""

    def cost_ns(num_blocks: int) -> float:
        width = bits * (num_blocks - distance) / num_blocks
        comparisons = bucket / 2**width
        each = _TABLE_NS + num_hashes * (_HASH_NS + _COMPARISON_NS * comparisons)
        return comb(num_blocks, distance) * each

    most = min(distance + _MOST_BLOCKS, bits)
    num_blocks = min(range(distance + 1, most + 1), key=cost_ns)
    blocks = _cut(bits, num_blocks)
    choices = combinations(range(num_blocks), num_blocks - distance)
    return [_Table(bits, blocks, chosen) for chosen in choices]


def _cut(bits: int, num_blocks: int) -> tuple[tuple[int, int], ...]:
    """Blocks of nearly the same width, from the high end down."""
    edges = [bits * number // num_blocks for number in range(num_blocks + 1)]
    return tuple((low, high - low) for low, high in pairwise(edges))[::-1]


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
    permuted = table.permuted(hashes)
    permuted.sort()
    large, num_large = _large_buckets(permuted, table.rest)
    small = permuted if large is None else permuted[~large]
    for pairs in _scan(small, table.rest, distance):
        yield from _first_ones(table, pairs)
    if large is None:
        return
    rest = permuted[large]
    del permuted, small, large
    for further in _tables(len(rest), len(rest) // num_large, table.rest, distance):
        for pairs in _join(rest, further, distance):
            yield from _first_ones(table, pairs)


def _first_ones(table: _Table, pairs: Pairs) -> Iterator[Pairs]:
    if len(pairs[0]):
        first, second = table.restored(pairs[0]), table.restored(pairs[1])
        is_first = table.is_first_for((first, second))
        yield first[is_first], second[is_first]


def _large_buckets(ordered: Hashes, rest: int) -> tuple[npt.NDArray[np.bool_] | None, int]:
    """Which hashes lie in buckets of more than SCAN, and how many such buckets there are."""
    if len(ordered) <= SCAN or 2**rest <= SCAN:
        return None, 0
    begins = np.flatnonzero(_agree(ordered[:-SCAN], ordered[SCAN:], rest))
    if not len(begins):
        return None, 0
    edges = np.zeros(len(ordered) + 1, np.int32)
    np.add.at(edges, begins, 1)
    np.add.at(edges, begins + SCAN + 1, -1)
    keys = ordered[begins] >> np.uint64(rest)
    return np.cumsum(edges[:-1]) > 0, 1 + int((keys[1:] != keys[:-1]).sum())


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


def _move(hashes: Hashes, moves: Sequence[tuple[int, int, int]]) -> Hashes:
    moved = np.zeros_like(hashes)
    for low, target, width in moves:
        part = hashes >> np.uint64(low)
        part &= np.uint64((1 << width) - 1)
        part <<= np.uint64(target)
        moved |= part
    return moved


def _in_pieces(hashes: Hashes, change: Callable[[Hashes], Hashes]) -> Hashes:
    result = np.empty_like(hashes)
    for start in range(0, len(hashes), _PIECE):
        result[start : start + _PIECE] = change(hashes[start : start + _PIECE])
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
