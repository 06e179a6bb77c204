"""Packing: the images of a unit, one after the other, into one shard and its index.

An image's bytes are kept as they are unless the settings ask for other pixels. What is no usable
image stays in the index as a row with the reason. A unit's shard is written under a name that only
this attempt has, and counts from the moment its commit is there: killed at any point, or raced by
another packer, nothing is packed twice and nothing lost.
"""

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from random import randrange
from typing import Any

import pyarrow.compute as pc

from pipeline.cores import usable_cores
from pipeline.errors import SampleError, StoreError, UsageError
from pipeline.manifest import new_attempt
from pipeline.shards import IndexRows, ShardWriter, encode_index_table, sample_key
from pipeline.store import Store, open_store
from shard_tools.adopt import index_tar
from shard_tools.commits import (
    UnitCommit,
    commit_unit,
    read_unit_commit,
    read_unit_commits,
)
from shard_tools.download import DownloadSettings
from shard_tools.engine import Engine, EngineKind, make_engine
from shard_tools.filters import load_filter
from shard_tools.inputs import Arrival, read_inputs, tar_file
from shard_tools.judge import Accepted, RejectedError, judge, watched
from shard_tools.local_engine import count
from shard_tools.plan import PackSettings, Plan, read_unit
from shard_tools.sandbox import Sandbox
from shard_tools.sources import Kind, PlannedInput
from shard_tools.tars import size_of

DUPLICATE = "duplicate"

ATTEMPT_LIMIT_S = 12 * 3600.0  # half of gc's grace, which counts from an upload's begin

Judge = Callable[[bytes], Accepted]


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How to pack, which changes nothing of what comes out; a stored plan knows none of it."""

    engine: EngineKind = "local"
    address: str | None = None  # of a Ray cluster
    workers: int | None = None  # None: as many as there are CPUs
    filter: str | None = None  # the plan's, allowed to run by whoever started this
    download: DownloadSettings = field(default_factory=DownloadSettings)


@dataclass(frozen=True)
class UnitTask:
    """What a worker is told: pack this unit."""

    dataset: str
    plan: str
    kind: Kind
    unit: int
    settings: PackSettings
    options: PackOptions
    job: str  # attempts begin with it, so that a job knows its own commits
    careful: bool = False  # its last worker died: every image in a process that may die too


@dataclass(frozen=True)
class PackReport:
    """What one run of pack did, and what the plan has in all."""

    plan: str
    units: int
    units_before: int  # that were committed when it started
    units_elsewhere: int  # that another packer committed meanwhile
    packed: int  # images, by this run
    packed_bytes: int
    rejected: dict[str, int]
    seconds: float

    @property
    def images_per_s(self) -> float:
        """Inputs looked at a second, the rejected among them."""
        return (self.packed + sum(self.rejected.values())) / max(self.seconds, 1e-9)


def add_reports(reports: Sequence[PackReport]) -> PackReport:
    """What several runs of pack did, as one; it has the last one's plan."""
    rejected: Counter[str] = Counter()
    for report in reports:
        rejected.update(report.rejected)
    numbers = ("units", "units_before", "units_elsewhere", "packed", "packed_bytes", "seconds")
    sums = {name: sum(getattr(report, name) for report in reports) for name in numbers}
    return replace(reports[-1], rejected=dict(rejected), **sums)


def pack(
    dataset: Store,
    plan: Plan,
    options: PackOptions,
    *,
    on_tick: Callable[[int, int], None],
    on_resume: Callable[[int], None] = lambda rows: None,
) -> PackReport:
    """Pack every unit of a plan that has no commit yet.

    `on_resume` is told once how many inputs were packed before; `on_tick`, see LocalEngine. Raises
    UsageError if the plan has a Python filter that `options` does not allow; StoreError if a unit
    failed for good; what is committed stays, and a second run does the rest.
    """
    _refuse_unasked_filter(plan, options)
    started = time.monotonic()
    todo, rows_before = _todo(dataset, plan)
    on_resume(rows_before)
    # Several packers of one plan begin at different places, so they seldom do the same work.
    turn = randrange(len(todo)) if todo else 0
    job = new_attempt()[:8]
    workers = _num_workers(options, len(todo))
    options = replace(options, download=options.download.shared_by(workers or 1))
    tasks = (
        UnitTask(dataset.url, plan.name, plan.kind, unit, plan.settings, options, job)
        for unit in chain(todo[turn:], todo[:turn])
    )
    engine = _engine(options, workers, on_tick)
    units = packed = packed_bytes = 0
    rejected: Counter[str] = Counter()
    for done in engine.run(tasks):
        if done.attempt.startswith(job):
            units += 1
            packed += done.kept
            packed_bytes += done.sample_bytes
            rejected.update(done.rejected)
    return PackReport(
        plan=plan.name,
        units=plan.num_units,
        units_before=plan.num_units - len(todo),
        units_elsewhere=len(todo) - units,
        packed=packed,
        packed_bytes=packed_bytes,
        rejected=dict(rejected),
        seconds=time.monotonic() - started,
    )


def _num_workers(options: PackOptions, num_units: int) -> int | None:
    """Processes; None for all that a cluster has."""
    if options.address is not None:
        return options.workers
    return min(options.workers or usable_cores(), max(num_units, 1))


def _engine(
    options: PackOptions, workers: int | None, on_tick: Callable[[int, int], None]
) -> Engine[UnitTask, UnitCommit]:
    return make_engine(
        options.engine,
        pack_unit,
        workers=workers,
        address=options.address,
        on_tick=on_tick,
        after_death=lambda task: replace(task, careful=True),
        progress_of=lambda done: (done.rows, done.rows - done.kept),
    )


def _refuse_unasked_filter(plan: Plan, options: PackOptions) -> None:
    """A plan is data: it may ask for a filter, but not make us run somebody's code."""
    wanted = plan.settings.image.filter
    if wanted == options.filter:
        return
    if wanted is None:
        raise UsageError(f"plan {plan.name} has no filter: leave out --filter, or make a new plan")
    raise UsageError(
        f"plan {plan.name} filters images by the Python function {wanted}; if you trust it, give "
        f"--filter {wanted}"
    )


def _todo(dataset: Store, plan: Plan) -> tuple[list[int], int]:
    """The units without a commit, and the number of inputs in the others."""
    todo: list[int] = []
    rows_before = 0
    for unit, before in enumerate(read_unit_commits(dataset, plan)):
        if before is None:
            todo.append(unit)
        else:
            rows_before += before.rows
    return todo, rows_before


def pack_unit(task: UnitTask) -> UnitCommit:
    """Pack and commit one unit, unless somebody has; the commit that counts. Runs in a worker."""
    dataset = open_store(task.dataset)
    before = read_unit_commit(dataset, task.plan, task.unit)
    if before is not None:
        return before
    started = time.time()  # which goes on while a machine sleeps
    attempt = task.job + new_attempt()
    name = f"data/{attempt[-2:]}/{task.plan[:8]}-{task.unit:08d}-{attempt}"
    inputs = read_unit(dataset, task.plan, task.unit)
    with _judging(task) as judge_image:
        if task.kind == "adopt":
            shard = _index_shard(dataset, f"{name}.tar", task, inputs[0], judge_image)
        else:
            rows = _rows(task, inputs, judge_image)
            shard = _write_shard(dataset, f"{name}.tar", rows, unique=task.settings.unique)
    done = _write_index(dataset, f"{name}.parquet", shard)
    if time.time() - started > ATTEMPT_LIMIT_S:
        raise StoreError(
            f"{name}.tar took more than {ATTEMPT_LIMIT_S / 3600:.0f} hours, so gc may have removed "
            "it: it is packed again; if that happens often, choose smaller shards"
        )
    winner = commit_unit(dataset, task.plan, task.unit, replace(done, attempt=attempt))
    if winner.attempt != attempt:
        for key in {done.tar, done.index} - {winner.tar}:  # an adopted tar is nobody's to delete
            dataset.delete(key)
    return winner


@contextlib.contextmanager
def _judging(task: UnitTask) -> Iterator[Judge]:
    """The function that judges this unit's images."""
    settings, name = task.settings.image, task.options.filter
    if task.careful:
        with Sandbox(settings, name) as sandbox:
            yield sandbox.judge
        return
    keep = load_filter(name) if name is not None else None
    with watched() as watch:
        yield lambda data: watch(judge, data, settings, keep=keep)


@dataclass(slots=True)
class _Row:
    """One input on its way into the index; `data` is None if it is rejected."""

    columns: dict[str, Any]
    data: bytes | None = None
    extension: str = ""


def _rows(task: UnitTask, inputs: Sequence[PlannedInput], judge_image: Judge) -> Iterator[_Row]:
    """Judge the inputs one by one as they arrive."""
    settings = task.settings
    arrivals = read_inputs(
        inputs,
        task.kind,
        max_bytes=settings.image.max_bytes,
        url_column=settings.url_column,
        download=task.options.download,
    )
    for arrival in arrivals:
        row = _judged(arrival, judge_image)
        row.columns["key"] = sample_key(task.plan, arrival.row)
        count(rejected=row.data is None)
        yield row


def _judged(arrival: Arrival, judge_image: Judge) -> _Row:
    columns = arrival.columns
    try:
        if isinstance(arrival.data, SampleError):
            raise arrival.data
        accepted = judge_image(arrival.data)
    except SampleError as error:
        known = error.columns if isinstance(error, RejectedError) else {}
        columns.update(known, status="rejected", reason=error.reason)
        return _Row(columns)
    columns.update(accepted.columns, status="ok")
    return _Row(columns, accepted.data, accepted.extension)


@dataclass(frozen=True)
class _Shard:
    """A tar that is complete, and the rows of its index."""

    tar: str
    tar_bytes: int
    tar_tag: str | None
    tar_hash: bytes
    rows: IndexRows


def _write_shard(dataset: Store, name: str, rows: Iterator[_Row], *, unique: bool) -> _Shard:
    """Stream the rows into a shard, with memory for one image."""
    index = IndexRows()
    seen: set[bytes] | None = set() if unique else None
    with dataset.writer(name) as tar:
        shard = ShardWriter(tar)
        for row in rows:
            if row.data is not None:
                _add(shard, row, row.data, seen)
            index.append(row.columns)
        tar_hash = shard.finish()
    return _Shard(tar.info.key, tar.info.size_bytes, tar.info.tag, tar_hash, index)


def _add(shard: ShardWriter, row: _Row, data: bytes, seen: set[bytes] | None) -> None:
    """Append an image, or reject it if its bytes were `seen` before."""
    digest = hashlib.sha256(data).digest()
    if seen is not None:
        if digest in seen:
            row.columns.update(status="rejected", reason=DUPLICATE)
            return
        seen.add(digest)
    entry = shard.add(row.columns["key"], row.extension, data, digest)
    row.columns.update(
        offset=entry.offset, length=entry.length, crc32c=entry.crc32c, sha256=entry.sha256
    )


def _index_shard(
    dataset: Store, name: str, task: UnitTask, tar: PlannedInput, judge_image: Judge
) -> _Shard:
    """Index a shard where it lies; for one that is gone an empty one is written."""
    file = tar_file(tar)
    adopted = index_tar(
        file,
        keys=lambda number: sample_key(task.plan, tar.row + number),
        judge=judge_image,
        on_image=lambda rejected: count(rejected=rejected),
        max_bytes=task.settings.image.max_bytes,
    )
    if not adopted.is_readable:
        return replace(_write_shard(dataset, name, iter(()), unique=False), rows=adopted.rows)
    return _Shard(file.url, size_of(file), adopted.tar_tag, adopted.tar_hash, adopted.rows)


def _write_index(dataset: Store, name: str, shard: _Shard) -> UnitCommit:
    table = shard.rows.table()
    body = encode_index_table(table)
    with dataset.writer(name) as index:
        index.write(body)
    kept = table.filter(pc.equal(table["status"], "ok"))
    rejected = pc.value_counts(table["reason"].drop_null()).to_pylist()
    return UnitCommit(
        tar=shard.tar,
        index=index.info.key,
        tar_bytes=shard.tar_bytes,
        index_bytes=index.info.size_bytes,
        tar_tag=shard.tar_tag,
        index_tag=index.info.tag,
        tar_hash=shard.tar_hash.hex(),
        index_sha256=hashlib.sha256(body).hexdigest(),
        rows=len(table),
        kept=len(kept),
        sample_bytes=pc.sum(kept["length"]).as_py() or 0,
        rejected={entry["values"]: entry["counts"] for entry in rejected},
    )
