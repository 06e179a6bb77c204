"""What a command costs: CPU seconds and peak memory of its processes, once they have ended."""

import json
import subprocess
import sys
from dataclasses import dataclass

from tests.support.launch import ROOT, environment

# A process of its own between: a child's peak begins with that of the process that started it.
_MEASURE = """
import json, resource, subprocess, sys, time
started = time.monotonic()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
cpu_s, peak_bytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
wall_s = time.monotonic() - started
print(json.dumps({"cpu_s": cpu_s, "wall_s": wall_s, "peak_bytes": peak_bytes}))
sys.exit(code)
"""


@dataclass(frozen=True)
class Usage:
    """Of a process and all that it waited for; the peak is the largest single one's."""

    cpu_s: float
    wall_s: float
    peak_bytes: int


def run_measured(*command: str) -> Usage:
    """Run a command to its end, with one thread for numerical libraries.

    Raises CalledProcessError, having shown the end of what it wrote to stderr, if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-S", "-c", _MEASURE, *command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.stderr.write(done.stderr[-2000:])
    done.check_returncode()
    return Usage(**json.loads(done.stdout))
