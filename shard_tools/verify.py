"""Reads a data set back: does every byte that the snapshot vouches for lie on the store, unchanged?

A shard passes if its objects have the recorded sizes and tags, its index the recorded SHA-256, and
the tar, walked strictly, holds exactly the index's samples with their CRC32C, SHA-256 and the
shard's hash. Of an adopted shard, which is not ours, the samples are read where the index says. A
few samples a shard are also decoded: bytes may be what was recorded and no image all the same. Some
shards are also read by webdataset itself, in a child process because it imports torch.
"""

import hashlib
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.decode import MAX_BYTES, MAX_PIXELS, decode_rgb
from pipeline.errors import (
    DataError,
    ObjectChangedError,
    ObjectMissingError,
    SampleError,
    ShardError,
)
from pipeline.manifest import Snapshot
from pipeline.shards import Sample, kept_rows, read_adopted_samples, read_index, read_samples
from pipeline.store import PART_BYTES, Store, open_store, resolve
from shard_tools.local_engine import LocalEngine, count

DECODED_SAMPLES = 4  # a shard, the first among them

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
    decoded: int = 0


@dataclass(frozen=True)
class VerifyReport:
    """What was verified, all of it sound."""

    version: int
    shards: int
    samples: int
    read_bytes: int
    quick: bool
    read_by_webdataset: int | None  # samples; None where webdataset is not installed or not asked
    decoded: int = 0  # samples


def verify(
    dataset: Store,
    snapshot: Snapshot,
    *,
    quick: bool,
    workers: int,
    on_tick: Callable[[int, int], None],
) -> VerifyReport:
    """Check every shard of a snapshot; `quick` looks at what exists, its size and its tag only.

    Raises ShardError that lists all damaged shards; StoreError if the store cannot be read.
    """
    workers = min(workers, max(len(snapshot), 1))
    engine = LocalEngine(verify_shard, workers=workers, on_tick=on_tick)
    samples = read_bytes = decoded = 0
    problems: list[str] = []
    for verdict in engine.run(_tasks(dataset, snapshot.table, quick)):
        samples += verdict.samples
        read_bytes += verdict.read_bytes
        decoded += verdict.decoded
        problems += [verdict.problem] if verdict.problem is not None else []
    _raise_problems(problems, len(snapshot))
    seen = None if quick else _check_interoperability(dataset, snapshot)
    return VerifyReport(
        version=snapshot.version,
        shards=len(snapshot),
        samples=samples,
        read_bytes=read_bytes,
        quick=quick,
        read_by_webdataset=seen,
        decoded=decoded,
    )


def verify_shard(task: ShardTask) -> ShardVerdict:
    """Check one shard. Damage is a verdict, not an exception. Runs in a worker."""
    try:
        samples, decoded = _quick(task) if task.quick else _thorough(task)
    except (DataError, ObjectMissingError, ObjectChangedError) as error:
        return ShardVerdict(task.tar, str(error))
    read_bytes = task.index_bytes + (0 if task.quick else task.tar_bytes)
    return ShardVerdict(task.tar, None, samples, read_bytes, decoded)


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


def _quick(task: ShardTask) -> tuple[int, int]:
    """Whether all objects are there, sizes and tags; how many samples there are, and 0 decoded."""
    dataset = open_store(task.dataset)
    _check_object(dataset, task.tar, task.tar_bytes, task.tar_tag)
    _check_object(dataset, task.index, task.index_bytes, task.index_tag)
    if task.mask is not None:
        _check_object(dataset, task.mask, None, None)
    return task.kept, 0


def _thorough(task: ShardTask) -> tuple[int, int]:
    """Everything; returns how many samples were read, and how many of them decoded."""
    _quick(task)
    dataset = open_store(task.dataset)
    index = _read_index(dataset, task)
    chosen = samples_to_decode(index, task.tar_hash)
    samples = 0
    for sample in _samples(dataset, task, index):
        samples += 1
        count(rejected=False)
        if sample.key in chosen:
            _decode(sample, chosen[sample.key], task)
    return samples, len(chosen)


def _read_index(dataset: Store, task: ShardTask) -> pa.Table:
    """A shard's index, held against the snapshot. Raises ShardError."""
    store, key = resolve(dataset, task.index)
    index = read_index(store.get(key), where=store.url_of(key), sha256=task.index_sha256)
    kept = len(kept_rows(index, _read_mask(dataset, task)))
    if (len(index), kept) != (task.rows, task.kept):
        raise ShardError(
            f"{store.url_of(key)}: has {len(index)} rows of which {kept} are kept, "
            f"the snapshot says {task.rows} and {task.kept}"
        )
    return index


def _samples(dataset: Store, task: ShardTask, index: pa.Table) -> Iterator[Sample]:
    store, key = resolve(dataset, task.tar)
    read = read_adopted_samples if _is_adopted(task.tar) else read_samples
    stream = store.reader(key, task.tar_bytes, tag=task.tar_tag)
    return read(stream, index, where=store.url_of(key), shard_hash=task.tar_hash)


def _is_adopted(tar: str) -> bool:
    return "://" in tar


def samples_to_decode(index: pa.Table, seed: bytes) -> dict[str, dict[str, Any]]:
    """The samples to decode, by key: the first that was decoded once, and some others.

    The same ones every time, so that what was found can be found again.
    """
    decodable = pc.and_(pc.equal(index["status"], "ok"), pc.is_valid(index["phash"]))
    rows = index.filter(decodable)
    others = range(1, len(rows))
    chosen = random.Random(seed).sample(others, min(DECODED_SAMPLES - 1, len(others)))
    taken = rows.take(pa.array(sorted([*range(len(rows))[:1], *chosen]), pa.int64()))
    return {row["key"]: row for row in taken.to_pylist()}


def _decode(sample: Sample, row: dict[str, Any], task: ShardTask) -> None:
    """Decode a sample, under caps that let pass what was packed under higher ones."""
    try:
        pixels = decode_rgb(
            sample.data,
            max_pixels=max(MAX_PIXELS, row["width"] * row["height"]),
            max_bytes=max(MAX_BYTES, row["length"]),
        )
    except SampleError as error:
        raise ShardError(
            f"{task.tar}: sample {sample.key} does not decode: {error}; it did when it was packed, "
            "so compare the versions of Pillow and simplejpeg, or drop it: "
            "`python -m shard_tools mask`"
        ) from None
    if pixels.shape[:2] != (row["height"], row["width"]):
        raise ShardError(
            f"{task.tar}: sample {sample.key} has {pixels.shape[1]}x{pixels.shape[0]} pixels, "
            f"recorded were {row['width']}x{row['height']}"
        )


def _check_object(dataset: Store, key_or_url: str, size_bytes: int | None, tag: str | None) -> None:
    store, key = resolve(dataset, key_or_url)
    info = store.head(key)
    if info is None:
        raise ObjectMissingError(f"{store.url_of(key)}: there is no such object")
    if size_bytes is not None and info.size_bytes != size_bytes:
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
    """Read our first and last shard that hold samples with webdataset; how many it saw.

    What it makes of an adopted shard is for whoever wrote that.
    """
    if importlib.util.find_spec("webdataset") is None:
        return None
    ours = np.array([not _is_adopted(tar) for tar in snapshot.tar], dtype=bool)
    # webdataset takes a tar without samples for an error
    filled = np.flatnonzero(ours & (snapshot.kept > 0))
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
