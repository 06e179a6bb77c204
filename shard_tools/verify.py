"""Reads a data set back: does every byte that the snapshot vouches for lie on the store, unchanged?

A shard passes if its objects have the recorded sizes and tags, its index the recorded SHA-256, and
the tar, walked strictly, holds exactly the index's samples with their CRC32C, SHA-256 and the
shard's hash. Some shards are also read by webdataset itself, in a child process because it imports
torch.
"""

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError, ObjectChangedError, ObjectMissingError, ShardError
from pipeline.manifest import Snapshot
from pipeline.shards import kept_rows, read_index, read_samples
from pipeline.store import PART_BYTES, Store, open_store, resolve
from shard_tools.engine import LocalEngine, count

_NAMED_SHARDS = 20

# Prints shard, key and SHA-256 of every sample, as any user of webdataset would see them.
_READ_WITH_WEBDATASET = """
import hashlib, json, sys, webdataset
for number, shard in enumerate(sys.argv[1:]):
    for sample in webdataset.WebDataset(shard, shardshuffle=False):
        fields = [name for name in sample if not name.startswith("__")]
        digests = [hashlib.sha256(sample[name]).hexdigest() for name in fields]
        print(json.dumps([number, sample["__key__"], digests]))
"""


@dataclass(frozen=True)
class ShardTask:
    """What a worker is told: check this shard."""

    dataset: str
    tar: str
    index: str
    tar_bytes: int
    index_bytes: int
    tar_tag: str | None
    index_tag: str | None
    tar_hash: bytes
    index_sha256: bytes
    rows: int
    kept: int
    mask: str | None
    mask_sha256: bytes | None
    quick: bool


@dataclass(frozen=True)
class ShardVerdict:
    """What a check found: `problem` is None for a sound shard."""

    tar: str
    problem: str | None
    samples: int = 0
    read_bytes: int = 0


@dataclass(frozen=True)
class VerifyReport:
    """What was verified, all of it sound."""

    version: int
    shards: int
    samples: int
    read_bytes: int
    quick: bool
    read_by_webdataset: int | None  # samples; None where webdataset is not installed or not asked


def verify(
    dataset: Store,
    snapshot: Snapshot,
    *,
    quick: bool,
    workers: int,
    on_tick: Callable[[int, int], None],
) -> VerifyReport:
    """Check every shard of a snapshot; `quick` looks at indexes and sizes only.

    Raises ShardError that lists all damaged shards; StoreError if the store cannot be read.
    """
    workers = min(workers, max(len(snapshot), 1))
    engine = LocalEngine(verify_shard, workers=workers, on_tick=on_tick)
    samples = read_bytes = 0
    problems: list[str] = []
    for verdict in engine.run(_tasks(dataset, snapshot.table, quick)):
        samples += verdict.samples
        read_bytes += verdict.read_bytes
        problems += [verdict.problem] if verdict.problem is not None else []
    _raise_problems(problems, len(snapshot))
    seen = None if quick else _check_interoperability(dataset, snapshot)
    return VerifyReport(snapshot.version, len(snapshot), samples, read_bytes, quick, seen)


def verify_shard(task: ShardTask) -> ShardVerdict:
    """Check one shard. Damage is a verdict, not an exception. Runs in a worker."""
    try:
        samples = _quick(task) if task.quick else _thorough(task)
    except (DataError, ObjectMissingError, ObjectChangedError) as error:
        return ShardVerdict(task.tar, str(error))
    read_bytes = task.index_bytes + (0 if task.quick else task.tar_bytes)
    return ShardVerdict(task.tar, None, samples, read_bytes)


def _tasks(dataset: Store, shards: pa.Table, quick: bool) -> Iterator[ShardTask]:
    for batch in shards.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            yield ShardTask(dataset=dataset.url, quick=quick, **row)


def _raise_problems(problems: list[str], num_shards: int) -> None:
    if not problems:
        return
    advice = "restore what is named from a copy, or pack the source into a new data set"
    if len(problems) == 1:
        raise ShardError(f"1 of {num_shards} shards is damaged: {problems[0]}; {advice}")
    lines = "".join(f"\n  {problem}" for problem in problems[:_NAMED_SHARDS])
    more = f"\n  … and {len(problems) - _NAMED_SHARDS} more" if problems[_NAMED_SHARDS:] else ""
    raise ShardError(f"{len(problems)} of {num_shards} shards are damaged; {advice}:{lines}{more}")


def _quick(task: ShardTask) -> int:
    """Sizes and tags of both objects."""
    dataset = open_store(task.dataset)
    _check_object(dataset, task.tar, task.tar_bytes, task.tar_tag)
    _check_object(dataset, task.index, task.index_bytes, task.index_tag)
    return task.kept


def _thorough(task: ShardTask) -> int:
    """Everything; returns the number of samples read."""
    _quick(task)
    dataset = open_store(task.dataset)
    store, key = resolve(dataset, task.index)
    index = read_index(store.get(key), where=store.url_of(key), sha256=task.index_sha256)
    kept = len(kept_rows(index, _read_mask(dataset, task)))
    if (len(index), kept) != (task.rows, task.kept):
        raise ShardError(
            f"{store.url_of(key)}: has {len(index)} rows of which {kept} are kept, "
            f"the snapshot says {task.rows} and {task.kept}"
        )
    store, key = resolve(dataset, task.tar)
    stream = store.reader(key, task.tar_bytes, tag=task.tar_tag)
    samples = 0
    for _ in read_samples(stream, index, where=store.url_of(key), shard_hash=task.tar_hash):
        samples += 1
        count(rejected=False)
    return samples


def _check_object(dataset: Store, key_or_url: str, size_bytes: int, tag: str | None) -> None:
    store, key = resolve(dataset, key_or_url)
    info = store.head(key)
    if info is None:
        raise ObjectMissingError(f"{store.url_of(key)}: there is no such object")
    if info.size_bytes != size_bytes:
        raise ShardError(
            f"{store.url_of(key)}: has {info.size_bytes} bytes, recorded were {size_bytes}"
        )
    if tag is not None and info.tag != tag:
        raise ObjectChangedError(f"{store.url_of(key)}: has tag {info.tag}, recorded was {tag}")


def _read_mask(dataset: Store, task: ShardTask) -> bytes | None:
    if task.mask is None:
        return None
    store, key = resolve(dataset, task.mask)
    mask = store.get(key)
    if hashlib.sha256(mask).digest() != task.mask_sha256:
        raise ShardError(f"{store.url_of(key)}: the mask's SHA-256 is not the recorded one")
    return mask


def _check_interoperability(dataset: Store, snapshot: Snapshot) -> int | None:
    """Read the first and last shard that hold samples with webdataset; how many it saw."""
    if importlib.util.find_spec("webdataset") is None:
        return None
    filled = np.flatnonzero(snapshot.kept)  # webdataset takes a tar without samples for an error
    chosen = np.unique(filled[[0, -1]]) if len(filled) else filled
    tasks = list(_tasks(dataset, snapshot.table.take(chosen), quick=False))
    with tempfile.TemporaryDirectory(prefix="shard_tools-") as folder:
        copies = [Path(folder) / f"{number}.tar" for number in range(len(tasks))]
        for task, copy in zip(tasks, copies, strict=True):
            _download(*resolve(dataset, task.tar), task.tar_bytes, copy)
        seen, complaint = _read_with_webdataset(copies)
    for number, task in enumerate(tasks):
        _compare(dataset, task, [sample for shard, *sample in seen if shard == number], complaint)
    return len(seen)


def _read_with_webdataset(shards: list[Path]) -> tuple[list[list[Any]], str]:
    """Every sample as [shard, key, SHA-256 of its fields], and the child's last words."""
    child = subprocess.run(
        [sys.executable, "-c", _READ_WITH_WEBDATASET, *map(str, shards)],
        capture_output=True,
        text=True,
        check=False,
    )
    complaint = child.stderr.strip().splitlines()[-1:] if child.returncode else []
    return [json.loads(line) for line in child.stdout.splitlines()], "".join(complaint)


def _compare(dataset: Store, task: ShardTask, seen: list[list[Any]], complaint: str) -> None:
    """Hold what webdataset saw of a shard against its index."""
    store, key = resolve(dataset, task.index)
    rows = kept_rows(read_index(store.get(key), where=store.url_of(key)), None).to_pylist()
    if complaint or seen != [[row["key"], [row["sha256"].hex()]] for row in rows]:
        raise ShardError(
            f"{task.tar}: webdataset reads {len(seen)} of {len(rows)} samples, or "
            f"reads them differently; this shard is sound but not portable ({complaint})"
        )


def _download(store: Store, key: str, size_bytes: int, target: Path) -> None:
    reader = store.reader(key, size_bytes)
    with target.open("wb") as file:
        while piece := reader.read(PART_BYTES):
            file.write(piece)
