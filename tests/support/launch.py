"""Start the real commands as a user does: child processes, the deepspeed launcher, SIGKILL."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
LIMIT_S = 240


def environment() -> dict[str, str]:
    """Two ranks on two cores, CPUs only, collectives on loopback."""
    return os.environ | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


def run_module(
    *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m …`, to its end, with its output."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment() | (env or {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def start_deepspeed(
    arguments: Sequence[str], *, log: Path, ranks: int = 2
) -> subprocess.Popen[str]:
    """`deepspeed --module trainer …` in a process group of its own, its output going to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["--num_accelerators", str(ranks), "--master_addr", "127.0.0.1"]
    launcher += ["--master_port", str(port), "--module", "trainer"]
    with log.open("a") as output:
        return subprocess.Popen(
            [str(BIN / "deepspeed"), *launcher, *arguments],
            env=environment(),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher and all its ranks."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(LIMIT_S)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file that may still be written to."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool], *, log: Path) -> None:
    """Wait until `ready()`, which must come before the process ends."""
    deadline = time.monotonic() + LIMIT_S
    while not ready():
        assert process.poll() is None, (
            f"ended with {process.returncode}:\n{log.read_text()[-4000:]}"
        )
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The training processes that a launcher has started, however deep."""
    found, parents = [], [launcher.pid]
    while parents:
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", ",".join(map(str, parents))],
            capture_output=True,
            text=True,
            check=False,
        )
        children = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
        found += [int(pid) for pid, line in children if " -m trainer " in line]
        parents = [int(pid) for pid, _ in children]
    return found
