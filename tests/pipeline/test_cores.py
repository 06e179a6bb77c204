"""How many cores are ours: files as kernels and container engines lay them out."""

import os
from pathlib import Path

import pytest

from pipeline.cores import usable_cores

ALL = len(os.sched_getaffinity(0))


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V1 = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        # Version 2, of a container: its own group is the root that it sees.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, ALL),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "25000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9000000 100000\n"}, ALL),
        # Of a host: the quota is of a group above ours.
        (
            {
                "proc/self/cgroup": "0::/a.slice/b.scope\n",
                "sys/fs/cgroup/a.slice/b.scope/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a.slice/cpu.max": "50000 100000\n",
            },
            1,
        ),
        # Version 1: the path is the host's, the files are at the mount.
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/f00\n4:memory:/docker/f00\n",
                f"{V1}/cpu.cfs_quota_us": "80000\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n0::/\n",
                f"{V1}/cpu.cfs_quota_us": "-1\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
            },
            ALL,
        ),
        # Both at once: version 2 without the controller.
        (
            {
                "proc/self/cgroup": "2:cpu,cpuacct:/job\n0::/job\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/unified/job/cgroup.procs": "1\n",
            },
            1,
        ),
        ({}, ALL),
    ],
)
def test_the_smallest_bound_counts(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    write(tmp_path, files)
    assert usable_cores(tmp_path) == cores


def test_here() -> None:
    assert 1 <= usable_cores() <= ALL


@pytest.mark.skipif(ALL < 2, reason="needs two cores")
def test_affinity_counts() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
