"""CPU time and memory of this process with its children, against what the kernel says later."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.processes import cpu_seconds, process_tree
from tests.support.launch import ROOT

BURN = "import time\nwhile time.process_time() < {}: pass\nprint(flush=True)\ninput()"
HOLD = "held = bytearray(b'x') * (64 << 20)\nprint(flush=True)\ninput()"


@contextmanager
def started(program: str) -> Iterator[int]:
    """The number of a Python process that has printed a line; behind the block it is let end."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            yield child.pid
        finally:
            child.communicate("\n")


def test_children_count_while_they_run_and_when_they_have_ended():
    before = cpu_seconds()
    with started(BURN.format(0.3)) as pid:
        assert pid in process_tree(os.getpid())
        running = cpu_seconds() - before
        assert 0.25 <= running < 5
    assert cpu_seconds() - before >= running


def test_own_time_counts():
    before, start_s = cpu_seconds(), time.process_time()
    while time.process_time() < start_s + 0.1:
        pass
    assert cpu_seconds() - before >= 0.08


_MEMORY = """
from pipeline.processes import resident_bytes
from tests.pipeline.test_processes import HOLD, started
before = resident_bytes()
with started(HOLD):
    print(resident_bytes() - before)
print(resident_bytes() - before)
"""


def test_memory_of_children_counts():
    """Of a small process: one that has all libraries shares them with others that come and go."""
    measured = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, check=True, cwd=ROOT, text=True
    )
    during, behind = map(int, measured.stdout.split())
    assert during > 60 << 20
    assert behind < 30 << 20
