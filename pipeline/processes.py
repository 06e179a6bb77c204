"""What this process and all processes below it use, while they run: CPU seconds and memory.

For pipeline.profile, whose loader has workers: getrusage counts children only once they have ended.
Read from Linux's /proc, where a clock tick (10 ms) is the smallest step of CPU time.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_AFTER_NAME = 2  # the number of the field that follows the process's name, counted from 1
_CPU_FIELDS = slice(14 - _AFTER_NAME - 1, 17 - _AFTER_NAME)  # utime, stime, cutime, cstime


def cpu_seconds() -> float:
    """User and system time of this process, its descendants, and those it has waited for."""
    return sum(map(_cpu_ticks, process_tree(os.getpid()))) / os.sysconf("SC_CLK_TCK")


def resident_bytes() -> int:
    """Memory of this process and its descendants; what they share is counted once."""
    return sum(map(_proportional_bytes, process_tree(os.getpid())))


def process_tree(pid: int) -> Iterator[int]:
    """A process and its descendants, as far as they still run."""
    yield pid
    for children in (_PROC / str(pid) / "task").glob("*/children"):
        for child in _read(children).split():
            yield from process_tree(int(child))


def _cpu_ticks(pid: int) -> int:
    _, _, fields = _read(_PROC / str(pid) / "stat").rpartition(")")  # a name may have spaces
    return sum(map(int, fields.split()[_CPU_FIELDS]))


def _proportional_bytes(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+) kB", _read(_PROC / str(pid) / "smaps_rollup"), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _read(path: Path) -> str:
    """A file of a process; empty if that has just ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
