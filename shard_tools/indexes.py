"""The indexes of a snapshot one after another, with what its masks leave of them.

Called by everything that looks at all rows of a data set: `stats` and `gallery`. A few indexes are
read ahead, so memory does not depend on the number of shards.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ShardError
from pipeline.manifest import Snapshot
from pipeline.shards import read_index
from pipeline.store import Store, resolve

READERS = 8

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardRows:
    """The index of one shard; the flags say what a mask does to its rows, bool [rows]."""

    shard: int
    table: pa.Table
    is_ok: Flags  # not rejected
    has_bit: Flags  # everywhere, if there is no mask

    @property
    def kept(self) -> Flags:
        """What readers see."""
        return self.is_ok & self.has_bit

    @property
    def masked(self) -> Flags:
        """Images that a mask hides."""
        return self.is_ok & ~self.has_bit

    @property
    def rejected(self) -> Flags:
        """Rejects that stand; one whose bit is 0 has been superseded by a retry."""
        return ~self.is_ok & self.has_bit


def read_indexes(
    dataset: Store, snapshot: Snapshot, shards: Sequence[int] | None = None
) -> Iterator[ShardRows]:
    """The indexes of some shards, by default of all, in order. Raises ShardError, StoreError."""
    shards = range(len(snapshot)) if shards is None else shards
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(shards), READERS):  # map alone would read all ahead
            some = shards[start : start + READERS]
            yield from readers.map(lambda shard: read_rows(dataset, snapshot, shard), some)


def read_rows(dataset: Store, snapshot: Snapshot, shard: int) -> ShardRows:
    """One shard's index. Raises ShardError if it or its mask is damaged; StoreError."""
    store, key = resolve(dataset, snapshot.index[shard])
    where = store.url_of(key)
    table = read_index(store.get(key), where=where, sha256=snapshot.index_sha256[shard])
    is_ok = pc.equal(table["status"], "ok").to_numpy()
    rows = ShardRows(shard, table, is_ok, _mask_bits(dataset, snapshot, shard, len(table)))
    if (kept := int(rows.kept.sum())) != snapshot.kept[shard]:
        raise ShardError(
            f"{where} keeps {kept} rows, the snapshot says {snapshot.kept[shard]}: run "
            f"`python -m shard_tools verify {dataset.url}`, or read an older version"
        )
    return rows


def _mask_bits(dataset: Store, snapshot: Snapshot, shard: int, num_rows: int) -> Flags:
    if snapshot.mask[shard] is None:
        return np.ones(num_rows, np.bool_)
    store, key = resolve(dataset, snapshot.mask[shard])
    mask = store.get(key)
    is_recorded = hashlib.sha256(mask).digest() == snapshot.mask_sha256[shard]
    if not is_recorded or len(mask) != -(-num_rows // 8):
        raise ShardError(
            f"{store.url_of(key)}: not the mask that was recorded for {num_rows} rows; restore the "
            "object, or read an older version of the data set"
        )
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=num_rows, bitorder="little")
    return bits.astype(np.bool_)
