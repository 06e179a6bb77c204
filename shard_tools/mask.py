"""New versions of a data set that hide some of its rows, and the way back.

A mask is a bitmap beside the shards: one bit an index row, 1 for keep. A new version names new
masks for the shards that change and leaves all others' entries alone, so a takedown or a curation
costs one small object a touched shard and not a byte of the shards is written again. Masks are only
ever combined by AND: what is hidden stays so, until an older version is restored.

Called by the command line (`mask`, `mask --restore`) and by dedup. The first to commit a version
wins, see pipeline.manifest; the loser applies its decisions to the winner's version.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import CropstreamError, UsageError
from pipeline.manifest import (
    SNAPSHOT_SCHEMA,
    Snapshot,
    commit_snapshot,
    latest_version,
    new_attempt,
    read_snapshot,
)
from pipeline.store import Store
from shard_tools.indexes import READERS, Flags, ShardRows, read_rows
from shard_tools.selection import Chooser, Selection

COMMIT_ATTEMPTS = 10

_SHARDS_AHEAD = 8 * READERS  # results are small: only READERS indexes are in memory at once

Decide = Callable[[str, ShardRows], Flags]
"""(tar as the snapshot names it, its index and mask) -> the bits that may stay, bool [rows].

Called from several threads. A shard is told by its tar: its number may be another one in the
version that the decision is finally applied to.
"""

OnTick = Callable[[int, int], None]
"""(rows looked at so far, 0)."""


@dataclass(frozen=True)
class MaskReport:
    """What a mask did. `snapshot` is the version that readers see now."""

    snapshot: Snapshot
    is_new: bool  # False: nothing would have changed, so no version was made
    kept_before: int
    kept_after: int
    shards_changed: int
    listed: int = 0  # distinct values on the lists of a selection
    found: int = 0  # of them, those that some row of the data set has

    @property
    def dropped(self) -> int:
        """Images that readers no longer see."""
        return self.kept_before - self.kept_after


@dataclass(frozen=True)
class _Mask:
    """A shard's new entry in the snapshot."""

    key: str
    sha256: bytes
    kept: int


def mask(
    dataset: Store,
    selection: Selection,
    *,
    version: int | None = None,
    on_tick: OnTick = lambda done, rejected: None,
) -> MaskReport:
    """Drop, or keep only, the rows of the newest version that a selection names.

    Rejected rows are left as they are. Raises UsageError if a list, pattern or expression of the
    selection is wrong, or if no image would be left; see also `mask_snapshot`.
    """
    chooser = Chooser(selection)
    chooser.check_columns(dataset, read_snapshot(dataset))
    report = mask_snapshot(
        dataset, decide=chooser.decide, note=selection.note, version=version, on_tick=on_tick
    )
    return replace(report, listed=chooser.num_listed, found=chooser.num_found)


def mask_snapshot(
    dataset: Store,
    *,
    decide: Decide,
    note: str,
    version: int | None = None,
    on_tick: OnTick = lambda done, rejected: None,
) -> MaskReport:
    """Commit a version whose masks are the newest version's AND what `decide` says.

    Reads a few indexes at a time and writes one object for each shard that changes; a shard whose
    bits stay keeps its entry. No version is made if none changes.

    Args:
        note: one line on how the version comes about. version: refuse unless it is the newest.

    Raises UsageError if no image would be left, or `version` is not the newest; ShardError if an
    index or mask is damaged; StoreError.
    """
    decided: dict[tuple[str, str | None], _Mask | None] = {}
    for _ in range(COMMIT_ATTEMPTS):
        snapshot = _newest(dataset, version)
        every = range(len(snapshot))
        masks = dict(_masks(dataset, snapshot, decide, decided, on_tick, every))
        kept = snapshot.num_kept - sum(int(snapshot.kept[s]) - m.kept for s, m in masks.items())
        if not masks:
            return MaskReport(snapshot, False, snapshot.num_kept, snapshot.num_kept, 0)
        if not kept:
            raise UsageError(
                f"{dataset.url}: none of {snapshot.num_kept} images would be left ({note}); "
                "nothing was changed: check the selection, or pack into a new data set"
            )
        attempt = new_attempt()
        committed = commit_snapshot(
            dataset,
            _with_masks(snapshot, masks),
            version=snapshot.version + 1,
            attempt=attempt,
            plans=snapshot.plans,
            note=note,
        )
        if committed.attempt == attempt:
            return MaskReport(committed, True, snapshot.num_kept, kept, len(masks))
    raise CropstreamError(_lost(dataset))


def remasked(dataset: Store, snapshot: Snapshot, decide: Decide, shards: Sequence[int]) -> pa.Table:
    """A snapshot's table with masks that also hide what `decide` says of some of the shards.

    Nothing is committed.
    """
    masks = _masks(dataset, snapshot, decide, {}, lambda *seen: None, shards)
    return _with_masks(snapshot, dict(masks))


def restore(dataset: Store, version: int, *, force: bool = False) -> Snapshot:
    """Undo: commit a version that is what `version` was, and return it.

    Restoring what the newest version holds already makes none. Raises ManifestError if there is no
    such version; UsageError if shards that were added since would be lost, unless `force`.
    """
    for _ in range(COMMIT_ATTEMPTS):
        newest, old = read_snapshot(dataset), read_snapshot(dataset, version)
        if _entries(newest).equals(_entries(old)) and newest.plans == old.plans:
            return newest
        if not force:
            _refuse_loss(dataset, newest, old)
        attempt = new_attempt()
        committed = commit_snapshot(
            dataset,
            old.table,
            version=newest.version + 1,
            attempt=attempt,
            plans=old.plans,
            note=f"version {version} restored",
        )
        if committed.attempt == attempt:
            return committed
    raise CropstreamError(_lost(dataset))


def _newest(dataset: Store, version: int | None) -> Snapshot:
    newest = latest_version(dataset)
    if version not in (None, newest):
        raise UsageError(
            f"{dataset.url}: version {version} is not the newest, which is {newest}; mask that, or "
            f"restore version {version} first"
        )
    return read_snapshot(dataset, newest or None)


def _masks(
    dataset: Store,
    snapshot: Snapshot,
    decide: Decide,
    decided: dict[tuple[str, str | None], _Mask | None],
    on_tick: OnTick,
    shards: Sequence[int],
) -> Iterator[tuple[int, _Mask]]:
    """The new entries of the shards that change, by number.

    `decided` remembers them by tar and mask: a version lost to another costs only what differs.
    """

    def look(shard: int) -> _Mask | None:
        name = (snapshot.tar[shard], snapshot.mask[shard])
        if name not in decided:
            rows = read_rows(dataset, snapshot, shard)
            decided[name] = _write_mask(dataset, rows, decide(snapshot.tar[shard], rows))
        return decided[name]

    done = 0
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(shards), _SHARDS_AHEAD):  # map alone would read all ahead
            some = shards[start : start + _SHARDS_AHEAD]
            for shard, entry in zip(some, readers.map(look, some), strict=True):
                done += int(snapshot.rows[shard])
                on_tick(done, 0)
                if entry is not None:
                    yield shard, entry


def _write_mask(dataset: Store, rows: ShardRows, decided: Flags) -> _Mask | None:
    """Write a shard's new mask; None if no bit changes."""
    bits = rows.has_bit & decided
    if np.array_equal(bits, rows.has_bit):
        return None
    body = np.packbits(bits, bitorder="little").tobytes()
    attempt = new_attempt()
    key = f"masks/{attempt[:2]}/{attempt}"
    dataset.put_if_absent(key, body)  # False would be our own first try: nobody has this name
    return _Mask(key, hashlib.sha256(body).digest(), int((bits & rows.is_ok).sum()))


def _with_masks(snapshot: Snapshot, masks: dict[int, _Mask]) -> pa.Table:
    """The snapshot's table with some shards' entries changed."""
    columns = {name: snapshot.table[name].to_pylist() for name in ("mask", "mask_sha256", "kept")}
    for shard, entry in masks.items():
        columns["mask"][shard] = entry.key
        columns["mask_sha256"][shard] = entry.sha256
        columns["kept"][shard] = entry.kept
    table = snapshot.table
    for name, values in columns.items():
        number = table.schema.get_field_index(name)
        column = SNAPSHOT_SCHEMA.field(name)
        table = table.set_column(number, column, pa.array(values, column.type))
    return table


def _entries(snapshot: Snapshot) -> pa.Table:
    return snapshot.table.replace_schema_metadata(None)


def _refuse_loss(dataset: Store, newest: Snapshot, old: Snapshot) -> None:
    is_added = pc.invert(pc.is_in(newest.table["tar"], value_set=old.table["tar"]))
    added = newest.table.filter(is_added)
    plans = sorted(set(newest.plans) - set(old.plans))
    if len(added) or plans:
        of_plans = f" of plans {', '.join(plans)}" if plans else ""
        images = pc.sum(added["kept"]).as_py() or 0
        raise UsageError(
            f"{dataset.url}: {len(added)} shards{of_plans} with {images} "
            f"images came after version {old.version} and would be gone from the restored "
            "one; restore a later version, or force it (a plan can be sealed again)"
        )


def _lost(dataset: Store) -> str:
    return (
        f"{dataset.url}: {COMMIT_ATTEMPTS} times another process committed a version first; "
        "nothing was changed, run the command again"
    )
