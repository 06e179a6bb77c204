"""Kernels: compiled once on a machine, and whoever has to wait for it is told."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNEL = """
from numba import int64
from pipeline.kernels import Kernel, part


@part
def twice(number):
    return 2 * number


kernel = Kernel(int64(int64), lambda number: twice(number) + 1)
"""


def test_compiling_is_told_once_and_loading_is_not(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(KERNEL)
    settings = {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    told = []
    for _ in range(2):
        child = subprocess.run(
            [sys.executable, "-c", "from small import kernel; print(kernel(4), kernel(5))"],
            cwd=tmp_path,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=True,
        )
        assert child.stdout.split() == ["9", "11"]
        told.append(child.stderr.count("compiling the kernels"))
    assert told == [1, 0]
