"""Whatever the engine, and though a worker is killed in mid-task: the same shards, rows and counts.

The command line is run as a user would. One worker walks into a trap in the filter below: in the
middle of a unit it says who it is, and waits to be killed.
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.manifest import read_snapshot
from pipeline.shards import read_index
from pipeline.store import open_store
from tests.shard_tools.conftest import ROOT, command, shard_tools, write_images

NUM_IMAGES = 40
SETTINGS = ("--shard-rows", "10", "--workers", "2", "--filter", f"{__name__}:walk_into_the_trap")
TRAP = "CROPSTREAM_TEST_TRAP"  # an environment variable; a sandbox's child does not have it
PATIENCE_S = 60.0

_calls = itertools.count(1)


def walk_into_the_trap(pixels: NDArray[np.uint8], columns: Mapping[str, Any]) -> bool:
    """Keep every image; but of all workers, the first at its fifth image gets no further."""
    if TRAP in os.environ and next(_calls) == 5:
        trap = Path(os.environ[TRAP])
        own = trap.with_name(f"{os.getpid()}.pid")
        own.write_text(str(os.getpid()))
        try:
            os.link(own, trap)  # appears with its content, and only once
        except FileExistsError:
            return True
        time.sleep(PATIENCE_S)
        raise AssertionError("nobody came to kill the worker in the trap")
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, NUM_IMAGES)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the local engine packs when nothing happens."""
    dataset = tmp_path_factory.mktemp("undisturbed")
    packed = shard_tools("pack", str(folder), str(dataset), *SETTINGS)
    assert packed.code == 0, packed.err
    return contents(dataset)


def contents(dataset: Path) -> list[dict[str, Any]]:
    """All that a snapshot says, shard by shard, but for the random names of its objects."""
    store = open_store(dataset)
    snapshot = read_snapshot(store)
    return [
        {
            "sha256": hashlib.sha256(store.get(snapshot.tar[shard])).hexdigest(),
            "index": read_index(store.get(snapshot.index[shard]), where=snapshot.index[shard]),
            **{
                name: snapshot.table[name][shard].as_py()
                for name in snapshot.table.column_names
                if name not in ("tar", "index", "tar_tag", "index_tag")
            },
        }
        for shard in range(len(snapshot))
    ]


def kill_the_trapped(trap: Path, packer: subprocess.Popen[str]) -> str:
    """SIGKILL the worker in the trap; the command line it had."""
    deadline = time.monotonic() + PATIENCE_S
    while not trap.exists():
        assert packer.poll() is None, packer.communicate()
        assert time.monotonic() < deadline, "no worker walked into the trap"
        time.sleep(0.02)
    worker = int(trap.read_text())
    assert packer.pid in ancestors(worker)
    name = Path(f"/proc/{worker}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    os.kill(worker, signal.SIGKILL)
    return name


def ancestors(process: int) -> list[int]:
    found = []
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(process)
    return found


@pytest.mark.parametrize(("engine", "name"), [("local", "spawn_main"), ("ray", "ray::")])
def test_a_worker_killed_in_mid_task_changes_nothing(
    engine: str, name: str, folder: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    trap = tmp_path / "trap"
    with subprocess.Popen(
        command(
            "pack", str(folder), str(tmp_path / "set"), *SETTINGS, "--engine", engine, "--json"
        ),
        cwd=ROOT,
        env={**os.environ, TRAP: str(trap), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as packer:
        assert name in kill_the_trapped(trap, packer)
        out, err = packer.communicate(timeout=PATIENCE_S)
    assert packer.returncode == 0, err
    assert json.loads(out)["packed"] == NUM_IMAGES
    assert contents(tmp_path / "set") == expected
    sources = [source for shard in expected for source in shard["index"]["source"].to_pylist()]
    assert len(sources) == len(set(sources)) == NUM_IMAGES
    assert len(expected) == 4
