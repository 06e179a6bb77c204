"""Packing: the images of a unit, one after the other, into one shard and its index.

An image's bytes are kept as they are, EXIF and all: nothing is rotated (the reference does not, and
the bytes still say how to), nothing encoded again. What is no usable image stays in the index as a
row with the reason. A unit's shard is written under a name that only this attempt has, and counts
from the moment its commit is there: killed at any point, or raced by another packer, nothing is
packed twice and nothing lost.
"""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from random import randrange
from typing import Any

from pipeline.decode import TOO_LARGE, guard_header, perceptual_hash
from pipeline.errors import ObjectMissingError, SampleError, StoreError
from pipeline.manifest import new_attempt
from pipeline.shards import ShardWriter, encode_index, sample_key
from pipeline.store import ObjectInfo, Store, open_store, read_file
from shard_tools.commits import UnitCommit, commit_unit, read_unit_commit, read_unit_commits
from shard_tools.engine import LocalEngine, count
from shard_tools.plan import PackSettings, Plan, PlannedFile, read_unit

MISSING = "missing"  # gone since the plan was made
CHANGED = "changed"  # of another size than planned
UNREADABLE = "unreadable"  # a local file that may not, or cannot, be read

READ_AHEAD_BYTES = 64 * 2**20  # a worker
READERS = 8  # requests at once, a worker

_EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif"}  # elsewhere the format's name in lower case


@dataclass(frozen=True)
class UnitTask:
    """What a worker is told: pack this unit."""

    dataset: str
    plan: str
    unit: int
    settings: PackSettings


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


def pack(
    dataset: Store,
    plan: Plan,
    *,
    workers: int,
    on_tick: Callable[[int, int], None],
    on_resume: Callable[[int], None] = lambda rows: None,
) -> PackReport:
    """Pack every unit of a plan that has no commit yet, in `workers` processes.

    `on_resume` is told once how many inputs were packed before; `on_tick`, see LocalEngine.
    Raises StoreError if a unit failed for good; what is committed stays, and a second run does the
    rest.
    """
    started = time.monotonic()
    todo: list[int] = []
    rows_before = 0
    for unit, before in enumerate(read_unit_commits(dataset, plan)):
        if before is None:
            todo.append(unit)
        else:
            rows_before += before.rows
    on_resume(rows_before)
    # Several packers of one plan begin at different places, so they seldom do the same work.
    turn = randrange(len(todo)) if todo else 0
    order = chain(todo[turn:], todo[:turn])
    tasks = (UnitTask(dataset.url, plan.name, unit, plan.settings) for unit in order)
    engine = LocalEngine(pack_unit, workers=min(workers, max(len(todo), 1)), on_tick=on_tick)
    units = packed = packed_bytes = 0
    rejected: Counter[str] = Counter()
    for done in engine.run(tasks):
        if done is not None:
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


def pack_unit(task: UnitTask) -> UnitCommit | None:
    """Pack and commit one unit; None if another packer committed it first. Runs in a worker."""
    dataset = open_store(task.dataset)
    if read_unit_commit(dataset, task.plan, task.unit) is not None:
        return None
    attempt = new_attempt()
    name = f"data/{attempt[:2]}/{task.plan[:8]}-{task.unit:08d}-{attempt}"
    inputs = read_unit(dataset, task.plan, task.unit)
    done = _write_shard(dataset, name, _rows(task, inputs), task.plan)
    if commit_unit(dataset, task.plan, task.unit, done, attempt=attempt):
        return done
    dataset.delete(done.tar)
    dataset.delete(done.index)
    return None


@dataclass
class _Row:
    """One input on its way into the index; `data` is None if it is rejected."""

    data: bytes | None
    extension: str = ""
    columns: dict[str, Any] = field(default_factory=dict)


def _write_shard(dataset: Store, name: str, rows: Iterator[_Row], plan: str) -> UnitCommit:
    """Stream the rows into a shard and its index."""
    columns: list[dict[str, Any]] = []
    with dataset.writer(f"{name}.tar") as tar:
        shard = ShardWriter(tar)
        for row in rows:
            if row.data is not None:
                entry = shard.add(row.columns["key"], row.extension, row.data)
                row.columns |= {
                    f: getattr(entry, f) for f in ("offset", "length", "crc32c", "sha256")
                }
            columns.append(row.columns)
        tar_hash = shard.finish()
    body = encode_index(columns, ["label"])
    with dataset.writer(f"{name}.parquet") as index:
        index.write(body)
    return _describe(tar.info, tar_hash, index.info, body, columns)


def _describe(
    tar: ObjectInfo,
    tar_hash: bytes,
    index: ObjectInfo,
    index_body: bytes,
    columns: Sequence[dict[str, Any]],
) -> UnitCommit:
    kept = [row for row in columns if row["status"] == "ok"]
    return UnitCommit(
        tar=tar.key,
        index=index.key,
        tar_bytes=tar.size_bytes,
        index_bytes=index.size_bytes,
        tar_tag=tar.tag,
        index_tag=index.tag,
        tar_hash=tar_hash.hex(),
        index_sha256=hashlib.sha256(index_body).hexdigest(),
        rows=len(columns),
        kept=len(kept),
        sample_bytes=sum(row["length"] for row in kept),
        rejected=dict(Counter(row["reason"] for row in columns if row["status"] != "ok")),
    )


def _rows(task: UnitTask, inputs: Sequence[PlannedFile]) -> Iterator[_Row]:
    """Judge the inputs one by one, reading ahead."""
    limits = task.settings
    for file, read in _read_ahead(inputs, limits.max_bytes):
        key = sample_key(task.plan, file.row)
        row: dict[str, Any] = {"key": key, "source": file.source, "label": file.label}
        try:
            data = read()
            header = guard_header(data, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes)
            row |= {"format": header.format, "width": header.width_px, "height": header.height_px}
            # An image that has a hash decodes: this is the proof, and dedup's raw material.
            row["phash"] = perceptual_hash(
                data, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes
            )
        except SampleError as error:
            count(rejected=True)
            yield _Row(None, columns=row | {"status": "rejected", "reason": error.reason})
        else:
            count(rejected=False)
            extension = _EXTENSIONS.get(header.format, header.format.lower())
            yield _Row(data, extension, row | {"status": "ok"})


def _read_ahead(
    inputs: Sequence[PlannedFile], max_bytes: int
) -> Iterator[tuple[PlannedFile, Callable[[], bytes]]]:
    """Every input with a function that returns its bytes, several being read at once meanwhile."""
    pending: deque[tuple[PlannedFile, Future[bytes]]] = deque()
    ahead_bytes = 0
    with ThreadPoolExecutor(READERS) as readers:
        for file in inputs:
            size = min(file.size_bytes, max_bytes)
            while pending and (
                ahead_bytes + size > READ_AHEAD_BYTES or len(pending) >= 2 * READERS
            ):
                first, future = pending.popleft()
                ahead_bytes -= min(first.size_bytes, max_bytes)
                yield first, future.result
            pending.append((file, readers.submit(_read, file, max_bytes)))
            ahead_bytes += size
        for first, future in pending:
            yield first, future.result


def _read(file: PlannedFile, max_bytes: int) -> bytes:
    """An input's bytes.

    Raises SampleError if it is too large, gone, unreadable on its disk, or not what was planned;
    StoreError if a store fails.
    """
    if file.size_bytes > max_bytes:
        raise SampleError(TOO_LARGE, f"{file.size_bytes} bytes, allowed are {max_bytes}")
    try:
        data = read_file(file.source)
        if len(data) != file.size_bytes:  # some clients pass a cut body as success
            data = read_file(file.source)
    except ObjectMissingError as error:
        raise SampleError(MISSING, str(error)) from None
    except StoreError as error:
        if not file.source.startswith("file://"):  # elsewhere it is the store that fails
            raise
        raise SampleError(UNREADABLE, str(error)) from None
    if len(data) != file.size_bytes:
        raise SampleError(CHANGED, f"{len(data)} bytes, planned were {file.size_bytes}")
    return data
