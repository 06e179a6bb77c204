"""What a command costs: CPU seconds and peak memory of its processes, once they have ended."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.support.launch import ROOT, environment


@dataclass(frozen=True)
class Usage:
    """Of a process and all its children that it waited for; the peak is the largest one's."""

    cpu_s: float
    wall_s: float
    peak_bytes: int


def run_measured(command: Sequence[str]) -> Usage:
    """Run a command to its end, with one thread for numerical libraries.

    Raises CalledProcessError, with the end of what it wrote to stderr, if it fails.
    """
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        log = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.stderr.buffer.write(log[-2000:])
        raise subprocess.CalledProcessError(process.returncode, command)
    return Usage(
        cpu_s=usage.ru_utime + usage.ru_stime,
        wall_s=time.monotonic() - started,
        peak_bytes=usage.ru_maxrss * 1024,
    )
