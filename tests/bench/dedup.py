"""Dedup of ten million rows: rate, peak memory, and whether every planted copy is found.

The indexes are synthetic, the data set is one of real indexes on a local disk (without the tars,
which dedup never reads), the command whole: reading, joining, the table of clusters, the masks.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.manifest import SNAPSHOT_SCHEMA, commit_snapshot, new_attempt
from pipeline.shards import INDEX_SCHEMA
from pipeline.store import open_store
from tests.bench.rows import Row
from tests.support.launch import ROOT, environment

GROUP = "pack.dedup_"

SHARDS, SHARD_ROWS = 200, 50_000
EXACT, NEAR, FLAT = 0.1, 0.1, 0.01  # of all rows: copies, near copies, flat images
DISTANCE = 3
_CUT_BITS = 40  # that a tenth of the images share: a bucket of a million in half of the tables

_MEASURED = """
import json, resource, sys
from pipeline.store import open_store
from shard_tools.dedup import dedup
found = dedup(open_store(sys.argv[1]), distance=int(sys.argv[2]))
peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
names = ("images", "exact", "near", "clusters", "flat", "seconds", "clusters_url")
print(json.dumps({name: getattr(found, name) for name in names} | {"peak_bytes": peak_bytes}))
"""


def rows() -> Iterator[Row]:
    """Ten million rows: a tenth exact copies, a tenth near ones, a tenth with 24 bits in common."""
    with tempfile.TemporaryDirectory() as folder:
        planted_exact, planted_near = _write_dataset(folder)
        found = _dedup(folder)
        recall = _recall(found["clusters_url"], planted_exact, planted_near)
    rate = found["images"] / found["seconds"]
    note = f"{found['images']} rows in {found['seconds']:.0f} s with {found['clusters']} clusters"
    yield Row("pack.dedup_rows_per_s", rate, "rows/s", target=">= 83000", note=note)
    peak = found["peak_bytes"] / 1e6
    yield Row("pack.dedup_peak_rss", peak, "MB", target="<= 2500", note="of the whole process")
    note = f"exact and within {DISTANCE} bits, among rows of which a tenth share 24 bits"
    yield Row("pack.dedup_recall", recall, "of planted copies", target=">= 1", note=note)


def _dedup(folder: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, folder, str(DISTANCE)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _recall(
    url: str, planted_exact: npt.NDArray[np.int64], planted_near: npt.NDArray[np.int64]
) -> float:
    """The share of planted rows that were dropped, for an image within the distance."""
    table = pq.read_table(url.removeprefix("file://"), columns=["kept", "shard", "row", "distance"])
    dropped = table.filter(pa.compute.invert(table["kept"]))
    assert pa.compute.max(dropped["distance"]).as_py() <= DISTANCE
    numbers = dropped["shard"].to_numpy() * SHARD_ROWS + dropped["row"].to_numpy()
    planted = np.concatenate([planted_exact, planted_near])
    return float(np.isin(planted, numbers).mean())


def _write_dataset(folder: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Write the indexes and a snapshot of them; the numbers of the planted copies.

    Copies have fewer pixels than any original, so it is they that must go.
    """
    rng = np.random.default_rng(0)
    size = SHARDS * SHARD_ROWS
    order = rng.permutation(size)
    exact, near, originals = np.split(order, [int(EXACT * size), int((EXACT + NEAR) * size)])
    flat, common = originals[: int(FLAT * size)], originals[-size // 10 :]
    # Of alone ones: an original that is itself dropped need not take its copy with it.
    alone = originals[len(flat) : -len(common)]
    phash = rng.integers(0, 2**64, size, dtype=np.uint64)
    phash[common] = phash[common] % 2**_CUT_BITS + np.uint64(0xA5C396 << _CUT_BITS)
    phash[near] = _flipped(rng, phash[rng.choice(alone, len(near))])
    phash[flat] = 0
    identity = np.arange(size)
    copied = rng.choice(originals, len(exact))
    identity[exact], phash[exact] = copied, phash[copied]
    width = rng.integers(512, 2048, size).astype(np.int32)
    width[exact] = width[near] = 256
    store = open_store(folder)
    shards = []
    for shard in range(SHARDS):
        part = slice(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
        body = _index(shard, identity[part], phash[part], width[part])
        store.put_if_absent(f"data/{shard}.parquet", body)
        shards.append(_snapshot_row(shard, body))
    table = pa.Table.from_pylist(shards, SNAPSHOT_SCHEMA)
    commit_snapshot(store, table, version=1, attempt=new_attempt())
    return exact, near


def _flipped(rng: np.random.Generator, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The hashes with one to DISTANCE bits changed."""
    flipped = hashes.copy()
    for _ in range(DISTANCE):
        flipped ^= np.uint64(1) << rng.integers(0, 64, len(hashes), dtype=np.uint64)
    return flipped


def _index(
    shard: int,
    identity: npt.NDArray[np.int64],
    phash: npt.NDArray[np.uint64],
    width: npt.NDArray[np.int32],
) -> bytes:
    count = len(identity)
    numbers = range(shard * count, (shard + 1) * count)
    columns = {
        "key": [f"0123abcd{number:012d}" for number in numbers],
        "offset": np.arange(count) * 100_352,
        "length": np.full(count, 100_000),
        "crc32c": phash.astype(np.uint32),
        "sha256": [hashlib.sha256(number.tobytes()).digest() for number in identity],
        "phash": phash,
        "width": width,
        "height": width,
        "format": ["JPEG"] * count,
        "source": [f"https://example.org/images/{number:012d}.jpg" for number in numbers],
        "status": ["ok"] * count,
        "reason": pa.nulls(count, pa.string()),
    }
    output = pa.BufferOutputStream()
    table = pa.table(columns).cast(INDEX_SCHEMA).replace_schema_metadata(INDEX_SCHEMA.metadata)
    pq.write_table(table, output, compression="zstd")
    body: bytes = output.getvalue().to_pybytes()
    return body


def _snapshot_row(shard: int, body: bytes) -> dict[str, Any]:
    return {
        "tar": f"data/{shard}.tar",
        "index": f"data/{shard}.parquet",
        "tar_bytes": 0,
        "index_bytes": len(body),
        "tar_hash": bytes(32),
        "index_sha256": hashlib.sha256(body).digest(),
        "rows": SHARD_ROWS,
        "kept": SHARD_ROWS,
    }
