"""Which units of a plan are done, and the step from all of them to a snapshot that readers see."""

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import CropstreamError, ManifestError, UsageError
from pipeline.manifest import (
    SNAPSHOT_SCHEMA,
    Numbers,
    Snapshot,
    commit,
    commit_snapshot,
    latest_version,
    new_attempt,
    read_commit,
    read_snapshot,
)
from pipeline.shards import row_of_key
from pipeline.store import Store
from shard_tools.indexes import Flags, ShardRows
from shard_tools.mask import remasked
from shard_tools.plan import Plan, read_unit, refuse_twice, unit_of

READERS = 16
SEAL_ATTEMPTS = 10
_BATCH_UNITS = 1000
_NAMED_UNITS = 10


@dataclass(frozen=True)
class UnitCommit:
    """What the commit of one unit says: its shard, and what became of its inputs."""

    tar: str
    index: str
    tar_bytes: int
    index_bytes: int
    tar_tag: str | None
    index_tag: str | None
    tar_hash: str
    index_sha256: str
    rows: int
    kept: int
    sample_bytes: int
    rejected: dict[str, int] = field(default_factory=dict)  # reason: how many
    attempt: str = ""  # whose it is


def commit_unit(dataset: Store, plan: str, unit: int, done: UnitCommit) -> UnitCommit:
    """Commit a packed unit unless another attempt has; the commit that is there now."""
    key = _commit_key(plan, unit)
    document = commit(dataset, key, asdict(done), attempt=done.attempt)
    return _parse(document, dataset.url_of(key))


def read_unit_commit(dataset: Store, plan: str, unit: int) -> UnitCommit | None:
    """The commit of a unit, or None. Raises ManifestError if it is damaged."""
    document = read_commit(dataset, _commit_key(plan, unit))
    return None if document is None else _parse(document, dataset.url_of(_commit_key(plan, unit)))


def read_unit_commits(dataset: Store, plan: Plan) -> Iterator[UnitCommit | None]:
    """The commits of all units, in order; None for a unit that has none."""
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, plan.num_units, _BATCH_UNITS):  # map alone would read all ahead
            units = range(start, min(start + _BATCH_UNITS, plan.num_units))
            yield from readers.map(lambda unit: read_unit_commit(dataset, plan.name, unit), units)


def seal(dataset: Store, plan: Plan) -> tuple[Snapshot, bool]:
    """Make a plan's shards visible: the newest snapshot's rows and theirs become the next version.

    Returns the snapshot that holds them, and whether it is new: a plan is sealed once. Raises
    CropstreamError, naming them, if units are missing; UsageError if the plan's source is in the
    snapshot already under another plan, or, for a retry, if what it replaces was replaced
    meanwhile.
    """
    for _ in range(SEAL_ATTEMPTS):
        latest = latest_version(dataset)
        parent = read_snapshot(dataset, latest) if latest else None
        if parent is not None and plan.name in parent.plans:
            return parent, False
        if parent is not None:
            refuse_twice(plan, dataset, parent)
        attempt = new_attempt()
        snapshot = commit_snapshot(
            dataset,
            pa.concat_tables([*_before(dataset, parent, plan), _shard_rows(dataset, plan)]),
            version=latest + 1,
            attempt=attempt,
            plans=[*(parent.plans if parent else ()), plan.name],
            note=f"{plan.kind} of {plan.source} packed",
        )
        if snapshot.attempt == attempt:
            return snapshot, True
    raise CropstreamError(
        f"{dataset.url}: {SEAL_ATTEMPTS} times another process sealed first; run `seal` again"
    )


def _before(dataset: Store, parent: Snapshot | None, plan: Plan) -> list[pa.Table]:
    """The shards that were there, less the rejects of which the plan was another try."""
    if parent is None:
        return []
    replaced = _replaced_rows(dataset, plan) if plan.retries else {}
    if not replaced:
        return [parent.table.replace_schema_metadata(None)]
    origins = ((shard, unit_of(tar)) for shard, tar in enumerate(parent.tar))
    shards = [shard for shard, origin in origins if origin and origin[0] in replaced]
    found: list[int] = []

    def stays(tar: str, rows: ShardRows) -> Flags:
        origin = unit_of(tar)
        assert origin is not None
        numbers = pc.cast(pc.utf8_slice_codeunits(rows.table["key"], 8), pa.int64()).to_numpy()
        is_replaced = rows.rejected & np.isin(numbers, replaced[origin[0]], kind="sort")
        found.append(int(is_replaced.sum()))
        return np.asarray(~is_replaced)

    table = remasked(dataset, parent, stays, shards)
    if sum(found) != (tried := sum(map(len, replaced.values()))):
        raise UsageError(
            f"plan {plan.name} is another try of {tried} rejects, of which only {sum(found)} still "
            "are: the others were tried again meanwhile, or taken down, and would be back. "
            f"Leave this plan, and run `python -m shard_tools retry {dataset.url} …` again"
        )
    return [table.replace_schema_metadata(None)]


def _replaced_rows(dataset: Store, plan: Plan) -> dict[str, Numbers]:
    """By the first letters of a plan, the numbers of its rows that this one replaces, ascending."""
    found: dict[str, list[int]] = defaultdict(list)
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, plan.num_units, READERS):
            units = range(start, min(start + READERS, plan.num_units))
            for unit in readers.map(lambda unit: read_unit(dataset, plan.name, unit), units):
                for planned in unit:
                    if planned.replaces is not None:
                        found[planned.replaces[:8]].append(row_of_key(planned.replaces))
    return {name: np.sort(np.array(rows, np.int64)) for name, rows in found.items()}


def _shard_rows(dataset: Store, plan: Plan) -> pa.Table:
    """The plan's shards as rows of a snapshot."""
    rows, missing = [], []
    for unit, done in enumerate(read_unit_commits(dataset, plan)):
        if done is None:
            missing.append(unit)
        else:
            rows.append(_snapshot_row(done))
    if missing:
        named = ", ".join(map(str, missing[:_NAMED_UNITS]))
        more = ", …" if len(missing) > _NAMED_UNITS else ""
        raise CropstreamError(
            f"{dataset.url}: {len(missing)} of {plan.num_units} units of plan {plan.name} are "
            f"not packed ({named}{more}): run `python -m shard_tools pack {dataset.url}`, "
            "which packs only these"
        )
    return pa.Table.from_pylist(rows, SNAPSHOT_SCHEMA)


def _snapshot_row(done: UnitCommit) -> dict[str, Any]:
    row = {name: value for name, value in asdict(done).items() if name in SNAPSHOT_SCHEMA.names}
    row["tar_hash"] = bytes.fromhex(done.tar_hash)
    row["index_sha256"] = bytes.fromhex(done.index_sha256)
    return row


def _parse(document: dict[str, Any], where: str) -> UnitCommit:
    names = {f.name for f in fields(UnitCommit)}
    try:
        return UnitCommit(**{name: value for name, value in document.items() if name in names})
    except TypeError as error:
        raise ManifestError(f"{where}: written by another version: {error}") from None


def _commit_key(plan: str, unit: int) -> str:
    return f"commits/{plan}/{unit:08d}.json"
