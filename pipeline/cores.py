"""How many cores this process may use: for numbers of processes and threads nobody has set.

Called wherever such a number is chosen. A machine of 128 cores says 128 inside a container that may
use 4 of them: what bounds a process is its affinity (cpusets, taskset, Slurm) and the CPU quotas of
the control groups it is in (containers, Kubernetes' limits); see the kernel's cgroup-v2.rst (file
cpu.max) and, for version 1, sched-bwc.rst (cpu.cfs_quota_us).
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_MOUNTS = {"": ("", "unified"), "cpu": ("cpu", "cpu,cpuacct")}  # of version 2, and of version 1


def usable_cores(root: Path = Path("/")) -> int:
    """At least one; a part of a core that a quota allows counts whole. `root` is where /proc is."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [math.ceil(quota) for quota in _quotas(root)]
    return max(1, min([affinity or 1, *quotas]))


def _quotas(root: Path) -> Iterator[float]:
    """The cores that every group of this process, and every group above it, may use."""
    for folder in _group_folders(root):
        with suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or "max", or -1
            quota, period = (folder / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
            if int(quota) > 0:
                yield int(quota) / int(period)


def _group_folders(root: Path) -> Iterator[Path]:
    """Where the files of our groups may be; a container does not see all of them."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            for controller in controllers.split(","):
                for mount in _MOUNTS.get(controller, ()):
                    path = PurePosixPath(group.lstrip("/"))
                    for part in (path, *path.parents):
                        yield root / "sys/fs/cgroup" / mount / part
