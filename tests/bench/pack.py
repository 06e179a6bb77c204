"""Peak memory of packing, few images against many, and CPU seconds an image."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench.rows import Row
from tests.support.dataset import pictures
from tests.support.launch import ROOT, environment

SHARD_ROWS = 1600
FEW, MANY = 6 * SHARD_ROWS, 24 * SHARD_ROWS  # allocators settle within the first few shards

_MEASURED = """
import resource, sys
from pipeline.errors import run_command
from shard_tools.__main__ import main
code = run_command(lambda: main(sys.argv[1:]))
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)
sys.exit(code)
"""


def rows() -> Iterator[Row]:
    """One worker packs folders of 250x250 JPEGs, into six shards and into 24."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few_bytes, few_s = _pack(folder, FEW)
        many_bytes, many_s = _pack(folder, MANY)
    growth = (many_bytes - few_bytes) / 1e6
    note = f"peak of the packing process with {MANY} images minus that with {FEW}"
    yield Row("pack.worker_rss_growth", growth, "MB", target="<= 20", note=note)
    yield Row("pack.worker_peak_rss", many_bytes / 1e6, "MB", target="<= 600")
    per_image_s = (many_s - few_s) / (MANY - FEW)
    yield Row("pack.cpu", per_image_s * 1e3, "CPU ms/image", note="perceptual hash included")


def _pack(folder: Path, count: int) -> tuple[int, float]:
    """Peak bytes and CPU seconds of the worker that packs `count` images."""
    source = folder / str(count)
    source.mkdir()
    for number, body in enumerate(pictures(100, size_px=(249, 251)) * (count // 100)):
        (source / f"{number:05d}.jpg").write_bytes(body)
    command = [sys.executable, "-c", _MEASURED, "pack", str(source), str(folder / f"out{count}")]
    packed = subprocess.run(
        [*command, "--workers", "1", "--shard-rows", str(SHARD_ROWS)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    peak, seconds = packed.stdout.splitlines()[-1].split()
    return int(peak), float(seconds)
