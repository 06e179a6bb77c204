"""The plan of a packing job: which inputs go into which shard, frozen before anything is packed.

A plan lies under `plans/<plan>/`: one Parquet file a unit (the input of one shard), then
`plan.json`, committed last. Its name is the hash of the inputs (URL, size, time or ETag, columns)
and of the settings, so the same job always has the same plan, wherever and how often it is started.
"""

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ManifestError, UsageError
from pipeline.manifest import (
    Snapshot,
    commit,
    latest_version,
    new_attempt,
    prove_conditional_put,
    read_commit,
    read_snapshot,
)
from pipeline.shards import parse_parquet
from pipeline.store import Store
from shard_tools.judge import ImageSettings
from shard_tools.sources import Kind, PlannedInput, kind_of, planned_inputs, source_url

PLAN_VERSION = 2

SHARD_ROWS = 50_000
SHARD_URLS = 5_000  # whose images' sizes nobody knows: about 256 MB of those that still exist

RETRY = "retry:"  # begins the source of a plan that is another try of a plan's rejects

_UNIT_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        ("size_bytes", pa.int64()),
        ("tag", pa.string()),
        ("label", pa.string()),
        ("origin", pa.string()),
        ("start_bytes", pa.int64()),
        ("end_bytes", pa.int64()),
        ("replaces", pa.string()),
    ]
)
"""The fields of PlannedInput, in their order; the columns that it carries follow as strings."""
_CARRIED = "column "  # before their names, which may be any
_UPLOADS = 16


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What decides a shard's content besides its inputs."""

    shard_bytes: int = 256 * 10**6  # of input, where sizes are known
    shard_rows: int | None = None  # at most; by default SHARD_ROWS, of URLs SHARD_URLS
    url_column: str | None = None  # of URL lists
    unique: bool = False  # whether bytes that the shard has already are rejected
    image: ImageSettings = field(default_factory=ImageSettings)

    def rows_at_most(self, kind: Kind) -> int:
        """Inputs of a unit, at most."""
        return self.shard_rows or (SHARD_URLS if kind == "urls" else SHARD_ROWS)


@dataclass(frozen=True)
class Plan:
    """A committed plan."""

    name: str
    kind: Kind
    source: str
    settings: PackSettings
    num_units: int
    num_inputs: int  # of tars: how many pieces of them
    total_bytes: int  # as far as they are known

    @property
    def retries(self) -> bool:
        """Whether its inputs are rejects of another plan; see shard_tools.retry."""
        return self.source.startswith(RETRY)

    @property
    def num_images(self) -> int | None:
        """Inputs that will be looked at; None for tars, which nobody has opened yet."""
        return self.num_inputs if self.kind in ("files", "urls") else None


def make_plan(
    source: str,
    dataset: Store,
    settings: PackSettings,
    *,
    kind: Kind | None = None,
    replace: bool = False,
) -> Plan:
    """List a source, write its plan and commit it; the same job's plan is found again, not remade.

    Args:
        kind: what the source holds; None looks at its files' names. replace: make the plan although
        another one of this source waits, unfinished.

    Raises UsageError if the source is empty, overlaps the data set, is in it already with other
    files, or has an unfinished plan with other files or settings.
    """
    url = source_url(source)
    if f"{dataset.url}/".startswith(_folder(url)):
        raise UsageError(f"{dataset.url} lies inside the source {url}: choose another place")
    if f"{url}/".startswith(_folder(dataset.url)):
        raise UsageError(f"the source {url} lies inside {dataset.url}: choose another place")
    found = kind or kind_of(source)
    inputs = planned_inputs(
        source,
        found,
        url_column=settings.url_column,
        span_bytes=settings.shard_bytes,
        guessed=kind is None,
    )
    return plan_inputs(inputs, dataset, settings, kind=found, source=url, replace=replace)


def plan_inputs(
    inputs: Iterable[PlannedInput],
    dataset: Store,
    settings: PackSettings,
    *,
    kind: Kind,
    source: str,
    replace: bool = False,
) -> Plan:
    """Write and commit the plan for these inputs of `source`. Raises UsageError as `make_plan`."""
    prove_conditional_put(dataset)
    with tempfile.TemporaryDirectory(prefix="shard_tools-") as folder:
        plan = _write_units(source, kind, inputs, settings, Path(folder))
        if read_commit(dataset, _plan_key(plan.name)) is None:
            sealed = read_snapshot(dataset) if latest_version(dataset) else None
            if sealed is not None:
                refuse_twice(plan, dataset, sealed)
            if not replace and not plan.retries:
                _refuse_second_plan(plan, dataset, sealed.plans if sealed else ())
            _refuse_same_letters(plan, dataset)
            _upload(plan, Path(folder), dataset)
    return plan


def read_plan(dataset: Store, name: str) -> Plan:
    """A committed plan. Raises UsageError if there is none, ManifestError if it is damaged."""
    is_name = re.fullmatch("[0-9a-f]{16}", name) is not None
    document = read_commit(dataset, _plan_key(name)) if is_name else None
    if document is None:
        raise UsageError(
            f"{dataset.url} has no plan {name!r}: "
            f"run `python -m shard_tools plan SOURCE {dataset.url}`"
        )
    return _parse(document, dataset.url_of(_plan_key(name)))


def list_plans(dataset: Store) -> list[str]:
    """The names of all committed plans."""
    keys = (info.key.split("/") for info in dataset.list("plans"))
    return sorted(parts[1] for parts in keys if parts[2:] == ["plan.json"])


def refuse_twice(plan: Plan, dataset: Store, snapshot: Snapshot) -> None:
    """A source that changed has a new plan: appending it would hold its old images twice.

    Raises UsageError if the snapshot holds the plan's source under another plan.
    """
    if plan.retries:  # it replaces what it packs
        return
    for name in snapshot.plans:
        earlier = read_plan(dataset, name)
        if earlier.source == plan.source and name != plan.name:
            raise UsageError(
                f"{dataset.url} holds {earlier.source} already, packed with "
                f"{_differences(earlier, plan)}: packing it again would store its images twice. "
                "Choose a new data set, or pack a source with only the new images"
            )


def read_unit(dataset: Store, plan: str, unit: int) -> list[PlannedInput]:
    """The inputs of one shard. Raises ManifestError if they are damaged."""
    key = _unit_key(plan, unit)
    try:
        table = parse_parquet(dataset.get(key))
        fields = table.select(_UNIT_SCHEMA.names).cast(_UNIT_SCHEMA)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ManifestError(f"{dataset.url_of(key)}: damaged, make a new plan: {error}") from None
    rest = table.drop_columns(_UNIT_SCHEMA.names)
    names = [name.removeprefix(_CARRIED) for name in rest.column_names]
    carried = rest.rename_columns(names).to_pylist() if names else repeat({}, len(table))
    # By position, in the order of the schema: a third of the time of keywords.
    return list(map(PlannedInput, *(column.to_pylist() for column in fields.columns), carried))


def unit_of(tar: str) -> tuple[str, int] | None:
    """The first letters of the plan that a shard was packed from, and its unit; None if adopted."""
    match = re.fullmatch(r"data/../([0-9a-f]{8})-(\d{8})-[0-9a-f]+\.tar", tar)
    return (match[1], int(match[2])) if match is not None else None


def _refuse_second_plan(plan: Plan, dataset: Store, sealed: Iterable[str]) -> None:
    """Work under an unfinished plan of the same source would be lost, and perhaps be sealed twice.

    Raises UsageError if there is one.
    """
    for name in set(list_plans(dataset)) - {plan.name, *sealed}:  # somebody may plan the same now
        waiting = read_plan(dataset, name)
        if waiting.source == plan.source:
            raise UsageError(
                f"{dataset.url} has an unfinished plan {name} of {plan.source}, made with "
                f"{_differences(waiting, plan)}. To finish that one: `python -m shard_tools pack "
                f"{dataset.url} --plan {name} --seal`; to leave it and begin anew: --new-plan"
            )


def _refuse_same_letters(plan: Plan, dataset: Store) -> None:
    """Keys begin with a plan's first letters, and are to be unique: one in 4 * 10**9 is not.

    Raises UsageError if there is another plan with the same ones.
    """
    for name in list_plans(dataset):
        if name != plan.name and name[:8] == plan.name[:8]:
            raise UsageError(
                f"{dataset.url} has a plan {name}, whose keys would be those of {plan.name}: "
                "change a setting, such as --shard-rows, by one"
            )


def _differences(old: Plan, new: Plan) -> str:
    """What an older plan of the same source has otherwise, in words."""
    before, now = _flat(old.settings), _flat(new.settings)
    found = [f"{name} {before[name]!r} (now {now[name]!r})" for name in now if
             before[name] != now[name]]  # fmt: skip
    if old.kind != new.kind:
        found.append(f"kind {old.kind} (now {new.kind})")
    return ", ".join(found) or (
        f"{old.num_inputs} inputs (now {new.num_inputs}, or other sizes, times or columns)"
    )


def _flat(settings: PackSettings) -> dict[str, Any]:
    values = dataclasses.asdict(settings)
    image = values.pop("image")
    return {**values, **image}


def _unusual(settings: PackSettings) -> dict[str, Any]:
    """The settings that are not the default: those of a later version do not rename old plans."""
    usual = _flat(PackSettings())
    return {name: value for name, value in _flat(settings).items() if value != usual[name]}


def _write_units(
    source: str,
    kind: Kind,
    inputs: Iterable[PlannedInput],
    settings: PackSettings,
    folder: Path,
) -> Plan:
    """Write the units' files into a local folder; their plan's name is known at the end only."""
    job = [source, kind, _unusual(settings), PLAN_VERSION]
    digest = hashlib.sha256(json.dumps(job).encode())
    num_units = num_inputs = total_bytes = 0
    for num_units, unit in enumerate(_cut(inputs, settings, kind), 1):
        for planned in unit:
            digest.update(_identity(planned))
        num_inputs += len(unit)
        total_bytes += sum(map(_weight, unit))
        target = folder / _unit_name(num_units - 1)
        pq.write_table(_as_table(unit), target, compression="zstd", write_page_checksum=True)
    name = digest.hexdigest()[:16]
    return Plan(name, kind, source, settings, num_units, num_inputs, total_bytes)


def _cut(
    inputs: Iterable[PlannedInput], settings: PackSettings, kind: Kind
) -> Iterator[list[PlannedInput]]:
    """Consecutive inputs, as many as fill a shard; a shard that is adopted is a unit of its own."""
    rows_at_most = 1 if kind == "adopt" else settings.rows_at_most(kind)
    unit: list[PlannedInput] = []
    unit_bytes = 0
    for planned in inputs:
        size = _weight(planned)
        if unit and (unit_bytes + size > settings.shard_bytes or len(unit) == rows_at_most):
            yield unit
            unit, unit_bytes = [], 0
        unit.append(planned)
        unit_bytes += size
    if unit:
        yield unit


def _weight(planned: PlannedInput) -> int:
    """Bytes that an input adds to its shard, 0 where nobody knows."""
    if planned.start_bytes is not None and planned.end_bytes is not None:
        return planned.end_bytes - planned.start_bytes
    return planned.size_bytes or 0


def _identity(planned: PlannedInput) -> bytes:
    """What makes an input the same one."""
    return repr(
        (
            planned.source,
            planned.size_bytes,
            planned.tag,
            planned.label,
            planned.origin is None,
            planned.start_bytes,
            planned.columns,
        )
    ).encode(errors="surrogateescape")


def _as_table(unit: list[PlannedInput]) -> pa.Table:
    carried = dict.fromkeys(name for planned in unit for name in planned.columns)
    values = [[getattr(planned, name) for planned in unit] for name in _UNIT_SCHEMA.names]
    values += [[planned.columns.get(name) for planned in unit] for name in carried]
    strings = [pa.field(f"{_CARRIED}{name}", pa.string()) for name in carried]
    schema = pa.schema([*_UNIT_SCHEMA, *strings])
    return pa.table(values, schema=schema)


def _upload(plan: Plan, folder: Path, dataset: Store) -> None:
    def upload(unit: int) -> None:
        # Not ours to replace: an earlier try may have written the same bytes, and got no further.
        dataset.put_if_absent(_unit_key(plan.name, unit), (folder / _unit_name(unit)).read_bytes())

    with ThreadPoolExecutor(_UPLOADS) as uploads:
        for start in range(0, plan.num_units, 1000):  # map alone would queue all of them
            list(uploads.map(upload, range(start, min(start + 1000, plan.num_units))))
    commit(dataset, _plan_key(plan.name), dataclasses.asdict(plan), attempt=new_attempt())


def _parse(document: dict[str, Any], where: str) -> Plan:
    document.pop("attempt", None)
    try:
        settings = dict(document["settings"])
        image = ImageSettings(**settings.pop("image"))
        return Plan(**{**document, "settings": PackSettings(**settings, image=image)})
    except (TypeError, KeyError, ValueError) as error:
        raise ManifestError(f"{where}: written by another version: {error}") from None


def _folder(url: str) -> str:
    return url if url.endswith("/") else f"{url}/"  # "file:///" is the root


def _plan_key(plan: str) -> str:
    return f"plans/{plan}/plan.json"


def _unit_key(plan: str, unit: int) -> str:
    return f"plans/{plan}/{_unit_name(unit)}"


def _unit_name(unit: int) -> str:
    return f"unit-{unit:08d}.parquet"
