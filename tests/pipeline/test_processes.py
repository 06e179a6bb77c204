"""CPU time and memory of this process with its children, against what the kernel says later."""

import os
import subprocess
import sys
import time

from pipeline.processes import cpu_seconds, process_tree, resident_bytes

BURN = "import time\nwhile time.process_time() < {}: pass\nprint(flush=True)\ninput()"


def start(program: str) -> subprocess.Popen[str]:
    """A Python process that has printed a line and waits for another."""
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    child.stdout.readline()
    return child


def test_children_count_while_they_run_and_when_they_have_ended():
    before = cpu_seconds()
    child = start(BURN.format(0.3))
    assert child.pid in process_tree(os.getpid())
    running = cpu_seconds() - before
    assert 0.25 <= running < 5
    child.communicate("\n")
    assert cpu_seconds() - before >= running


def test_own_time_counts():
    before, start_s = cpu_seconds(), time.process_time()
    while time.process_time() < start_s + 0.1:
        pass
    assert cpu_seconds() - before >= 0.08


def test_memory_of_children_counts():
    before = resident_bytes()
    child = start("held = bytearray(b'x') * (64 << 20)\nprint(flush=True)\ninput()")
    assert resident_bytes() - before > 60 << 20
    child.communicate("\n")
    assert resident_bytes() - before < 30 << 20
