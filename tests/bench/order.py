"""The order of ten billion samples in a million shards: how soon the first batch is there.

Each figure from a child process of its own. `order` gives it the shards' counts of kept samples as
an array, as the loader has them once the snapshot is parsed; `snapshot` has it read the snapshot as
well, from a local data set with names, tags and hashes of the usual lengths. Growth is that of the
process's peak over what it held with its modules imported.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.manifest import SNAPSHOT_SCHEMA, commit_snapshot, new_attempt
from pipeline.store import open_store
from tests.bench.rows import Row
from tests.support.launch import ROOT, environment

GROUP = "loader."

NUM_SHARDS = 1_000_000
MEAN_KEPT = 10_000
GLOBAL_BATCH, LANES, CHUNK, WINDOW = 4096, 64, 60, 4

# What both children do. The peak is the kernel's own of this process alone: ru_maxrss begins with
# that of the process which started it.
_COMMON = """
import json, sys, time
import numpy as np
from pipeline.manifest import read_snapshot
from pipeline.mixture import Source, mix_sources
from pipeline.store import open_store

def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

def first_batch(num_samples):
    source = Source("bench", num_samples, chunk={chunk}, window={window})
    mixture = mix_sources([source], global_batch={batch}, lanes={lanes}, seed=0)
    slots = mixture.slots(0, 0, range({lanes}))
    first = next(mixture.windows(0, 0, range({lanes})))
    assert num_samples >= 10**10 and len(slots.number) == {batch} and first.numbers
    return mixture

def shards_of(first_row, numbers):
    return np.searchsorted(first_row, numbers, side="right") - 1

def step_us(mixture, lanes, steps=200):
    begun = time.perf_counter()
    for step in range(steps):
        mixture.slots(3, step, range(lanes))
    return (time.perf_counter() - begun) / steps * 1e6
"""

_ORDER = """
kept = np.load(sys.argv[1])
before, begun = peak_bytes(), time.perf_counter()
first_row = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
mixture = first_batch(int(first_row[-1]))
found = shards_of(first_row, mixture.slots(0, 0, range({lanes})).number)
seconds, growth = time.perf_counter() - begun, peak_bytes() - before
print(json.dumps([seconds, growth, step_us(mixture, 1), step_us(mixture, {lanes})]))
"""

_SNAPSHOT = """
before, begun = peak_bytes(), time.perf_counter()
snapshot = read_snapshot(open_store(sys.argv[1]), 1)
mixture = first_batch(snapshot.num_kept)
found = shards_of(snapshot.first_row, mixture.slots(0, 0, range({lanes})).number)
names = [snapshot.tar[shard] for shard in found.tolist()]
seconds, growth = time.perf_counter() - begun, peak_bytes() - before
print(json.dumps([seconds, growth]))
"""


def rows() -> Iterator[Row]:
    """Seconds and growth of both, then microseconds of a step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"writing a snapshot of {NUM_SHARDS} shards", file=sys.stderr)
        kept = write_million_shards(str(folder / "dataset"))
        np.save(folder / "kept.npy", kept)
        seconds, growth, narrow_us, wide_us = _child(_ORDER, str(folder / "kept.npy"))
        what = f"{kept.sum() / 1e9:.0f} billion samples in {NUM_SHARDS / 1e6:.0f} million shards"
        yield Row("loader.order_first_batch_s", seconds, "s", "<= 1", what)
        yield Row("loader.order_rss_growth", growth / 1e6, "MB", "<= 200", "from the counts alone")
        yield Row("loader.order_step_1_lane", narrow_us, "us", "", f"{GLOBAL_BATCH // LANES} slots")
        yield Row("loader.order_step_64_lanes", wide_us, "us", "", f"{GLOBAL_BATCH} slots")
        seconds, growth = _child(_SNAPSHOT, str(folder / "dataset"))
        size_mb = (folder / "dataset/snapshots/v000001.parquet").stat().st_size / 1e6
        note = f"with reading the snapshot, {size_mb:.0f} MB in a local file"
        yield Row("loader.order_with_snapshot_first_batch_s", seconds, "s", "", note)
        yield Row("loader.order_with_snapshot_rss_growth", growth / 1e6, "MB", "", "all columns")


def write_million_shards(url: str, num_shards: int = NUM_SHARDS) -> np.ndarray[Any, Any]:
    """Commit a snapshot of shards that do not exist; returns int64 kept rows of each."""
    rng = np.random.default_rng(0)
    kept = rng.integers(MEAN_KEPT - 200, MEAN_KEPT + 220, num_shards)
    names = [_name(unit, attempt) for unit, attempt in enumerate(_words(rng, num_shards, 12))]
    table = {
        "tar": [f"{name}.tar" for name in names],
        "index": [f"{name}.parquet" for name in names],
        "tar_bytes": kept * 25_600,
        "index_bytes": kept * 51,
        "tar_tag": [f'"{tag}-31"' for tag in _words(rng, num_shards, 16)],
        "index_tag": [f'"{tag}"' for tag in _words(rng, num_shards, 16)],
        "tar_hash": _hashes(rng, num_shards),
        "index_sha256": _hashes(rng, num_shards),
        "rows": kept + 1700,
        "kept": kept,
        "mask": pa.nulls(num_shards, pa.string()),
        "mask_sha256": pa.nulls(num_shards, pa.binary()),
    }
    snapshot = pa.table(table).cast(SNAPSHOT_SCHEMA)
    commit_snapshot(open_store(url), snapshot, version=1, attempt=new_attempt())
    return kept


def _name(unit: int, attempt: str) -> str:
    return f"data/{attempt[-2:]}/5ea15ea1-{unit:08d}-{attempt}"


def _words(rng: np.random.Generator, count: int, num_bytes: int) -> Iterator[str]:
    body = rng.bytes(count * num_bytes).hex()
    width = 2 * num_bytes
    return (body[start : start + width] for start in range(0, len(body), width))


def _hashes(rng: np.random.Generator, count: int) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), count, [None, pa.py_buffer(rng.bytes(32 * count))]
    )


def _child(script: str, *arguments: str) -> list[float]:
    code = (_COMMON + script).format(batch=GLOBAL_BATCH, lanes=LANES, chunk=CHUNK, window=WINDOW)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.stderr.write(done.stderr[-2000:])
    done.check_returncode()
    return list(map(float, json.loads(done.stdout)))
