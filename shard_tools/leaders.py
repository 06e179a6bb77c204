"""Groups of rows that hold the same image, each led by the one that is kept.

Called by shard_tools.dedup, which brings the rows' columns and writes down the result. Three steps,
each on what the one before has left:

1. Exact: rows of equal SHA-256 (its first 16 bytes) are one; the best stays.
2. Rows of equal perceptual hash are one; the best stays.
3. Near: best first, a row is dropped only if it is within the distance of a row that is *kept*, and
   goes to the nearest such. Single linkage would chain images together that are unlike; here
   everything in a cluster is within the distance of its leader, and no two leaders are.

A flat image has almost no bits set, a steady gradient almost all: such hashes say nothing about
what is seen, so these rows, and those without a hash, take part in step 1 only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from shard_tools.hamming import HASH_BITS, Hashes, Numbers, near_pairs

Prefer = Literal["largest", "first"]

_PAIRS_AT_ONCE = 2**18
_DISTANCE_BITS = 4


@dataclass
class Rows:
    """Columns of the kept rows of a snapshot, in its order; arrays of [N] unless noted."""

    sha256: npt.NDArray[np.uint64] | None  # [N, 2], the first 16 bytes; None once it is used up
    phash: Hashes
    has_phash: npt.NDArray[np.bool_]
    pixels: Numbers
    length_bytes: Numbers

    def __len__(self) -> int:
        return len(self.phash)


def exact_leaders(rows: Rows, prefer: Prefer) -> Numbers:
    """For every row the best one of equal bytes, int64 [N]; itself if it is that."""
    assert rows.sha256 is not None
    leaders = np.arange(len(rows))
    high, low = rows.sha256[:, 0], rows.sha256[:, 1]
    order = np.argsort(high)
    members = order[_has_equal_neighbour(high[order])]
    members = members[np.lexsort((low[members], high[members]))]
    is_new = (high[members[1:]] != high[members[:-1]]) | (low[members[1:]] != low[members[:-1]])
    _follow_best(leaders, members, is_new, rows, prefer)
    return leaders


def near_leaders(
    rows: Rows,
    leaders: Numbers,
    *,
    distance: int,
    flat_bits: int,
    prefer: Prefer,
    max_pairs: int,
    threads: int,
) -> Numbers:
    """Steps 2 and 3 on top of `exact_leaders`: for every row the kept one it goes to, int64 [N].

    Raises UsageError if there are more than `max_pairs` pairs within the distance.
    """
    leaders = leaders.copy()
    nodes = np.flatnonzero(has_telling_hash(rows, flat_bits) & (leaders == np.arange(len(rows))))
    nodes = nodes[np.argsort(rows.phash[nodes], kind="stable")]
    members = nodes[_has_equal_neighbour(rows.phash[nodes])]
    is_new = rows.phash[members[1:]] != rows.phash[members[:-1]]
    _follow_best(leaders, members, is_new, rows, prefer)
    nodes = nodes[leaders[nodes] == nodes]
    del members, is_new
    hashes = rows.phash[nodes]
    first, second = near_pairs(hashes, distance, max_pairs=max_pairs, threads=threads)
    _lead(leaders, nodes, first, second, rows, prefer)
    return leaders[leaders[leaders]]  # a copy's best row may be a node's second, and that be led


def has_telling_hash(rows: Rows, flat_bits: int) -> npt.NDArray[np.bool_]:
    """Whether a row has a hash with more than `flat_bits` bits unlike the others."""
    bits_set = np.bitwise_count(rows.phash)
    return rows.has_phash & (bits_set > flat_bits) & (bits_set < HASH_BITS - flat_bits)


def distances(rows: Rows, members: Numbers, leaders: Numbers) -> npt.NDArray[np.uint8]:
    """How many bits of the hashes differ, uint8 [len(members)]; 0 where one has no hash."""
    difference = rows.phash[members] ^ rows.phash[leaders]
    have_both = rows.has_phash[members] & rows.has_phash[leaders]
    return np.where(have_both, np.bitwise_count(difference), 0).astype(np.uint8)


def _has_equal_neighbour(ordered: Hashes) -> npt.NDArray[np.bool_]:
    """Which of ascending values are there more than once, bool [N]."""
    result = np.zeros(len(ordered), np.bool_)
    is_equal = ordered[1:] == ordered[:-1]
    result[1:] |= is_equal
    result[:-1] |= is_equal
    return result


def _follow_best(
    leaders: Numbers,
    members: Numbers,
    is_new: npt.NDArray[np.bool_],
    rows: Rows,
    prefer: Prefer,
) -> None:
    """Let every member follow the best of its group; `is_new` marks where a group begins."""
    if not len(members):
        return
    group = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_new)])
    order = np.lexsort((*_goodness(rows, members, prefer), group))
    is_best = np.ones(len(members), np.bool_)
    is_best[1:] = group[1:] != group[:-1]  # the groups keep their places when sorted
    best = members[order][is_best]
    leaders[members] = best[group]


def _goodness(rows: Rows, members: Numbers, prefer: Prefer) -> tuple[Numbers, ...]:
    """Keys for np.lexsort, so that the better row comes first."""
    if prefer == "first":
        return (members,)
    return (members, -rows.length_bytes[members], -rows.pixels[members])


def _lead(
    leaders: Numbers,
    nodes: Numbers,
    first: Numbers,
    second: Numbers,
    rows: Rows,
    prefer: Prefer,
) -> None:
    """Step 3. `first` and `second` are places in `nodes`."""
    is_touched = np.zeros(len(nodes), np.bool_)
    is_touched[first] = is_touched[second] = True
    ranked = nodes[is_touched]
    ranked = ranked[np.lexsort(_goodness(rows, ranked, prefer))]
    rank = np.zeros(len(leaders), np.int32)
    rank[ranked] = np.arange(len(ranked), dtype=np.int32)
    is_kept = bytearray(b"\1") * len(ranked)
    for later, earlier in _pairs_in_order(nodes[first], nodes[second], rank, rows.phash):
        if is_kept[later] and is_kept[earlier]:
            is_kept[later] = 0
            leaders[ranked[later]] = ranked[earlier]


def _pairs_in_order(
    first: Numbers, second: Numbers, rank: npt.NDArray[np.int32], phash: Hashes
) -> Iterator[tuple[int, int]]:
    """(later rank, earlier rank): by the later, then the distance, then the earlier one.

    One word a pair, so that sorting needs no other memory.
    """
    one, other = rank[first].astype(np.uint64), rank[second].astype(np.uint64)
    words = np.maximum(one, other) << np.uint64(32 + _DISTANCE_BITS)
    words |= np.minimum(one, other)
    words |= np.bitwise_count(phash[first] ^ phash[second]).astype(np.uint64) << np.uint64(32)
    words.sort()
    for start in range(0, len(words), _PAIRS_AT_ONCE):
        piece = words[start : start + _PAIRS_AT_ONCE]
        later = (piece >> np.uint64(32 + _DISTANCE_BITS)).tolist()
        earlier = (piece & np.uint64(2**32 - 1)).tolist()
        yield from zip(later, earlier, strict=True)
