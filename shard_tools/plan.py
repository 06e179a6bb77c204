"""The plan of a packing job: which files go into which shard, frozen before anything is packed.

A plan lies under `plans/<plan>/`: one Parquet file a unit (the input of one shard), then
`plan.json`, committed last. Its name is the hash of the inputs (path, size, time or ETag) and of
the settings, so the same job always has the same plan, wherever and how often it is started.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.decode import MAX_BYTES, MAX_PIXELS
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
from pipeline.store import SourceFile, Store
from shard_tools.sources import label_of, sorted_files, source_url

PLAN_VERSION = 1

_UNIT_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # number in the whole plan
        pa.field("source", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        ("label", pa.string()),
    ]
)


@dataclass(frozen=True)
class PackSettings:
    """What decides a shard's content besides its inputs."""

    shard_bytes: int = 256 * 10**6  # of input
    shard_rows: int = 50_000
    max_bytes: int = MAX_BYTES  # of one image; larger ones are rejected unread
    max_pixels: int = MAX_PIXELS  # of one image; larger ones are rejected undecoded


@dataclass(frozen=True)
class Plan:
    """A committed plan."""

    name: str
    source: str
    settings: PackSettings
    num_units: int
    num_files: int
    total_bytes: int


@dataclass(frozen=True)
class PlannedFile:
    """One input of a unit."""

    row: int
    source: str
    size_bytes: int
    label: str | None


def make_plan(source: str, dataset: Store, settings: PackSettings) -> Plan:
    """List a source, write its plan and commit it; the same job's plan is found again, not remade.

    Raises UsageError if the source is empty, overlaps the data set, or is in it already with other
    files.
    """
    url = source_url(source)
    if f"{dataset.url}/".startswith(_folder(url)):
        raise UsageError(f"{dataset.url} lies inside the source {url}: choose another place")
    if f"{url}/".startswith(_folder(dataset.url)):
        raise UsageError(f"the source {url} lies inside {dataset.url}: choose another place")
    prove_conditional_put(dataset)
    with tempfile.TemporaryDirectory(prefix="shard_tools-") as folder:
        plan = _write_units(url, sorted_files(source), settings, Path(folder))
        if read_commit(dataset, _plan_key(plan.name)) is None:
            if latest_version(dataset):
                refuse_twice(plan, dataset, read_snapshot(dataset))
            _upload(plan, Path(folder), dataset)
    return plan


def read_plan(dataset: Store, name: str) -> Plan:
    """A committed plan. Raises UsageError if there is none, ManifestError if it is damaged."""
    document = read_commit(dataset, _plan_key(name))
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
    for name in snapshot.plans:
        earlier = read_plan(dataset, name)
        if earlier.source == plan.source and name != plan.name:
            raise UsageError(
                f"{dataset.url} holds {earlier.source} already, as it was with "
                f"{earlier.num_files} files (now {plan.num_files}, or other times or settings): "
                "packing it again would store its images twice. Choose a new data set, or pack a "
                "folder with only the new images"
            )


def read_unit(dataset: Store, plan: str, unit: int) -> list[PlannedFile]:
    """The inputs of one shard. Raises ManifestError if they are damaged."""
    key = _unit_key(plan, unit)
    try:
        table = parse_parquet(dataset.get(key)).cast(_UNIT_SCHEMA)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ManifestError(f"{dataset.url_of(key)}: damaged, make a new plan: {error}") from None
    return [PlannedFile(**row) for row in table.to_pylist()]


def _write_units(
    url: str, files: Iterable[SourceFile], settings: PackSettings, folder: Path
) -> Plan:
    """Write the units' files into a local folder; their plan's name is known at the end only."""
    digest = hashlib.sha256(json.dumps([url, dataclasses.asdict(settings), PLAN_VERSION]).encode())
    num_units = num_files = total_bytes = 0
    for num_units, unit in enumerate(_cut(files, settings), 1):
        rows = []
        for file in unit:
            digest.update(json.dumps([file.path, file.size_bytes, file.tag]).encode())
            rows.append(PlannedFile(num_files, file.url, file.size_bytes, label_of(file.path)))
            num_files += 1
            total_bytes += file.size_bytes
        table = pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], _UNIT_SCHEMA)
        target = folder / _unit_name(num_units - 1)
        pq.write_table(table, target, compression="zstd", write_page_checksum=True)
    name = digest.hexdigest()[:16]
    return Plan(name, url, settings, num_units, num_files, total_bytes)


def _cut(files: Iterable[SourceFile], settings: PackSettings) -> Iterator[list[SourceFile]]:
    """Consecutive files, as many as fill a shard."""
    unit: list[SourceFile] = []
    unit_bytes = 0
    for file in files:
        full = unit_bytes + file.size_bytes > settings.shard_bytes
        if unit and (full or len(unit) == settings.shard_rows):
            yield unit
            unit, unit_bytes = [], 0
        unit.append(file)
        unit_bytes += file.size_bytes
    if unit:
        yield unit


def _upload(plan: Plan, folder: Path, dataset: Store) -> None:
    for unit in range(plan.num_units):
        # Not ours to replace: an earlier try may have written the same bytes, and got no further.
        dataset.put_if_absent(_unit_key(plan.name, unit), (folder / _unit_name(unit)).read_bytes())
    commit(dataset, _plan_key(plan.name), dataclasses.asdict(plan), attempt=new_attempt())


def _parse(document: dict[str, Any], where: str) -> Plan:
    document.pop("attempt", None)
    try:
        return Plan(**{**document, "settings": PackSettings(**document["settings"])})
    except (TypeError, KeyError) as error:
        raise ManifestError(f"{where}: written by another version: {error}") from None


def _folder(url: str) -> str:
    return url if url.endswith("/") else f"{url}/"  # "file:///" is the root


def _plan_key(plan: str) -> str:
    return f"plans/{plan}/plan.json"


def _unit_key(plan: str, unit: int) -> str:
    return f"plans/{plan}/{_unit_name(unit)}"


def _unit_name(unit: int) -> str:
    return f"unit-{unit:08d}.parquet"
