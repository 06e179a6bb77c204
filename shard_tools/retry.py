"""Another try of what was rejected: timeouts, hosts that were down, files that had gone.

The rejects of a snapshot that have a given reason become the inputs of a new plan, one for each
plan they come from, with that plan's settings. Sealing it appends their shards and, in the same
commit, clears the old rejects' bits in their shards' masks: every input still has one row that
counts. What fails again is a reject of the new shards, and can be tried again.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UsageError
from pipeline.manifest import Snapshot
from pipeline.shards import row_of_key
from pipeline.store import Store
from shard_tools.indexes import read_indexes
from shard_tools.plan import RETRY, SHARD_URLS, Plan, plan_inputs, read_plan, read_unit, unit_of
from shard_tools.sources import PlannedInput


def plan_retry(dataset: Store, snapshot: Snapshot, reasons: Collection[str]) -> list[Plan]:
    """Plan another try of a snapshot's rejects; a retry that was interrupted is found again.

    Raises UsageError, naming the reasons that there are, if no reject has one of these.
    """
    units = _units(snapshot)
    plans = []
    for name in snapshot.plans:
        plan = read_plan(dataset, name)
        if plan.kind not in ("files", "urls"):
            continue  # a tar's damage does not mend
        inputs = _rejected_inputs(dataset, snapshot, plan, units[name[:8]], reasons)
        if (first := next(inputs, None)) is not None:
            plans.append(_plan(dataset, plan, chain([first], inputs)))
    if not plans:
        raise UsageError(
            f"version {snapshot.version} of {dataset.url} has no rejects with the reason "
            f"{' or '.join(sorted(reasons))} that can be tried again; what there is: "
            f"`python -m shard_tools stats {dataset.url}`"
        )
    return plans


def _units(snapshot: Snapshot) -> dict[str, dict[int, int]]:
    """By the first letters of a plan, the unit of each of its shards."""
    units: dict[str, dict[int, int]] = defaultdict(dict)
    for shard, tar in enumerate(snapshot.tar):
        if (origin := unit_of(tar)) is not None:
            units[origin[0]][shard] = origin[1]
    return units


def _plan(dataset: Store, plan: Plan, inputs: Iterator[PlannedInput]) -> Plan:
    # Without the snapshot's version: what was interrupted is to be found again in a later one.
    settings = replace(plan.settings, shard_rows=plan.settings.shard_rows or SHARD_URLS)
    return plan_inputs(inputs, dataset, settings, kind=plan.kind, source=f"{RETRY}{plan.name}")


def _rejected_inputs(
    dataset: Store,
    snapshot: Snapshot,
    plan: Plan,
    units: Mapping[int, int],
    reasons: Collection[str],
) -> Iterator[PlannedInput]:
    """What is rejected for these reasons in the plan's shards, whose units are given by shard."""
    asked = pa.array(sorted(reasons), pa.string())
    number = 0
    for rows in read_indexes(dataset, snapshot, list(units)):
        wanted = rows.rejected & pc.is_in(rows.table["reason"], value_set=asked).to_numpy()
        if not wanted.any():
            continue
        unit = read_unit(dataset, plan.name, units[rows.shard])
        by_row = {planned.row: planned for planned in unit}
        for key in rows.table["key"].filter(wanted).to_pylist():
            # Sizes and times may be others by now: what is there is what is packed.
            before = by_row[row_of_key(key)]
            yield replace(before, row=number, size_bytes=None, tag=None, replaces=key)
            number += 1
