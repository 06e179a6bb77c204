"""Files to shards: CPU seconds an image against webdataset's ShardWriter, and a worker's memory.

Photographs of 110 kB in a local folder, all in the page cache, become one shard without a look at
their pixels. Four ways, each in a process of its own that stays up, in turn:

    ours     pack_unit, as a worker calls it, with --no-decode: reads, checks the header, CRC32C,
             SHA-256, tar, index, commit
    bare     read, CRC32C, SHA-256, and write the same bytes one behind the other
    theirs   the loop of webdataset's documentation: read, ShardWriter.write; it computes no
             checksum, looks at no header and has no index
    copied   read, and write the same bytes: what theirs cannot do without

So (ours - bare) is what we add to the work that cannot be avoided, (theirs - copied) what they do,
and ours / theirs compares the whole although ours hashes every byte twice. CPU time is that of all
threads of the process, user and system.
"""

import hashlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import google_crc32c

from pipeline.store import open_store
from shard_tools.judge import ImageSettings
from shard_tools.pack import PackOptions, UnitTask, pack_unit
from shard_tools.plan import PackSettings, make_plan
from tests.bench.photographs import photographs, write_photographs
from tests.bench.rows import Row
from tests.bench.usage import Usage, run_measured

NUM_FILES = 2300  # a shard of 256 MB
ROUNDS = 9
FEW_SHARDS, MANY_SHARDS = 2, 6

Way = Callable[[Path, Path], float]


def rows() -> Iterator[Row]:
    """Three ratios and what they are made of, then the memory of packing few shards and many."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"writing {NUM_FILES} photographs", file=sys.stderr)
        write_photographs(folder / "source", NUM_FILES)
        yield from _against_shard_writer(folder)
        yield from _memory(folder)


# ----------------------------------------------------------------------------------------
# against ShardWriter


def _against_shard_writer(folder: Path) -> Iterator[Row]:
    ways: list[Way] = [_pack, _bare, _shard_writer, _copy]
    ours, bare, theirs, copied = _alternate(ways, folder)
    note = f"{NUM_FILES} photographs of 110 kB, not decoded; medians of {ROUNDS} rounds"
    yield Row("pack.files_vs_bare", ours / bare, "x", note=note)
    overhead = (ours - bare) / (theirs - copied)
    what = "(ours - bare) / (ShardWriter - copying)"
    yield Row("pack.files_overhead_vs_shardwriter", overhead, "x", "<= 0.333", what)
    yield Row("pack.files_vs_shardwriter", ours / theirs, "x", "<= 1.3", "ours / ShardWriter")
    values = {"ours": ours, "bare": bare, "shardwriter": theirs, "copied": copied}
    for way, seconds in values.items():
        yield Row(f"pack.files_{way}", seconds * 1e6, "CPU us/image")


def _alternate(ways: list[Way], folder: Path) -> list[float]:
    """CPU seconds an image of each way: the median of the rounds, after one to warm up."""
    timings: list[list[float]] = []
    with ExitStack() as stack:
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            for _ in ways
        ]
        for number in range(ROUNDS + 1):
            print(f"packing files: round {number} of {ROUNDS}", file=sys.stderr)
            timings.append([_run(pool, way, folder) for pool, way in zip(pools, ways, strict=True)])
    return [statistics.median(column) / NUM_FILES for column in zip(*timings[1:], strict=True)]


def _run(pool: ProcessPoolExecutor, way: Way, folder: Path) -> float:
    target = folder / "target"
    target.mkdir()
    try:
        return pool.submit(way, folder / "source", target).result()
    finally:
        shutil.rmtree(target)


def _pack(source: Path, target: Path) -> float:
    dataset = open_store(str(target))
    settings = PackSettings(shard_bytes=10**10, image=ImageSettings(decode=False))
    plan = make_plan(str(source), dataset, settings)
    assert plan.num_units == 1
    options = PackOptions()
    task = UnitTask(dataset.url, plan.name, plan.kind, 0, plan.settings, options, job="bench")
    start = time.process_time()
    done = pack_unit(task)
    assert done.kept == NUM_FILES
    return time.process_time() - start


def _bare(source: Path, target: Path) -> float:
    paths = _paths(source)
    start = time.process_time()
    with (target / "bytes").open("wb") as output:
        for path in paths:
            data = _read(path)
            google_crc32c.value(data)
            hashlib.sha256(data).digest()
            output.write(data)
    return time.process_time() - start


def _copy(source: Path, target: Path) -> float:
    paths = _paths(source)
    start = time.process_time()
    with (target / "bytes").open("wb") as output:
        for path in paths:
            output.write(_read(path))
    return time.process_time() - start


def _shard_writer(source: Path, target: Path) -> float:
    import webdataset  # here: it imports torch, which the other processes need not

    paths = _paths(source)
    start = time.process_time()
    with webdataset.ShardWriter(f"{target}/%06d.tar", maxsize=1e10, verbose=0) as output:
        for number, path in enumerate(paths):
            output.write({"__key__": f"{number:012d}", "jpg": _read(path)})
    return time.process_time() - start


def _paths(source: Path) -> list[str]:
    return sorted(map(str, source.iterdir()))


def _read(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123 - Path.open costs 2 us more
        return file.read()


# ----------------------------------------------------------------------------------------
# memory


def _memory(folder: Path) -> Iterator[Row]:
    """One worker packs folders into shards of 256 MB, decoding every image."""
    bodies = list(photographs(NUM_FILES // 5))
    few, many = (_pack_shards(folder, bodies, shards) for shards in (FEW_SHARDS, MANY_SHARDS))
    growth = (many.peak_bytes - few.peak_bytes) / 1e6
    note = f"peak with {MANY_SHARDS} shards of 256 MB minus that with {FEW_SHARDS}"
    yield Row("pack.worker_rss_growth", growth, "MB", "<= 20", note)
    yield Row("pack.worker_peak_rss", many.peak_bytes / 1e6, "MB", "<= 600")
    per_image_s = (many.cpu_s - few.cpu_s) / (NUM_FILES * (MANY_SHARDS - FEW_SHARDS))
    note = "photographs of 1024x683, decoded for the perceptual hash"
    yield Row("pack.cpu", per_image_s * 1e3, "CPU ms/image", note=note)


def _pack_shards(folder: Path, bodies: list[bytes], num_shards: int) -> Usage:
    print(f"packing {num_shards} shards", file=sys.stderr)
    source, target = folder / f"source{num_shards}", folder / f"target{num_shards}"
    source.mkdir()
    for number in range(NUM_FILES * num_shards):
        (source / f"{number:06d}.jpg").write_bytes(bodies[number % len(bodies)])
    command = [sys.executable, "-m", "shard_tools", "pack", str(source), str(target)]
    try:
        return run_measured(*command, "--workers", "1")
    finally:
        shutil.rmtree(source)
        shutil.rmtree(target, ignore_errors=True)
