"""Packers that are killed, doubled or starved: the data set ends up the same, each input once."""

import contextlib
import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.manifest import read_snapshot
from pipeline.shards import read_index
from pipeline.store import Store, open_store
from tests.shard_tools.conftest import ROOT, command, shard_tools, spawn_shard_tools, write_images

SETTINGS = ("--shard-rows", "20", "--workers", "2")


@pytest.fixture(scope="module")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images: ten shards, about a second of work."""
    folder = tmp_path_factory.mktemp("many")
    write_images(folder, 200, size_px=160)
    return folder


@pytest.fixture(scope="module")
def expected(many_images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The SHA-256 of every shard, packed without disturbance."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert shard_tools("pack", str(many_images), str(folder), *SETTINGS).code == 0
    return shard_digests(open_store(folder))


def shard_digests(store: Store) -> list[str]:
    snapshot = read_snapshot(store)
    return [hashlib.sha256(store.get(snapshot.tar[n])).hexdigest() for n in range(len(snapshot))]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def children(pid: int) -> list[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listing]


def commits(store: Store) -> int:
    return len(list(store.list("commits")))


def kill_after_commits(packer: subprocess.Popen[bytes], store: Store, count: int) -> None:
    """SIGKILL the packer as soon as that many units are committed; its workers must go with it."""
    while packer.poll() is None and commits(store) < count:
        time.sleep(0.005)
    workers = children(packer.pid)
    packer.kill()
    packer.wait()
    assert_end(workers)


def assert_end(pids: list[int]) -> None:
    """Wait until the processes are gone."""
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def assert_whole(store: Store, expected: list[str]) -> None:
    """The snapshot holds the undisturbed shards, one row an input, and only committed objects."""
    snapshot = read_snapshot(store)
    assert shard_digests(store) == expected
    indexes = [read_index(store.get(key), where=key) for key in snapshot.index]
    sources = [source for index in indexes for source in index["source"].to_pylist()]
    assert len(sources) == len(set(sources)) == 200
    assert snapshot.version == 1


@pytest.mark.parametrize("count", [0, 1, 4, pytest.param(9, marks=pytest.mark.slow)])
def test_killed_and_run_again(
    many_images: Path, dataset: str, expected: list[str], count: int
) -> None:
    store = open_store(dataset)
    arguments = ("pack", str(many_images), dataset, *SETTINGS)
    kill_after_commits(start(*arguments), store, count)
    before = commits(store)
    packed = spawn_shard_tools(*arguments, "--json").json()
    assert packed["units_before"] == before >= count
    assert packed["packed"] == 200 - 20 * before
    assert_whole(store, expected)


def test_killed_workers_are_replaced(
    many_images: Path, tmp_path: Path, expected: list[str]
) -> None:
    store = open_store(tmp_path)
    packer = start("pack", str(many_images), str(tmp_path), *SETTINGS)
    for count in (1, 4):
        while packer.poll() is None and commits(store) < count:
            time.sleep(0.005)
        if packer.poll() is None:
            os.kill(children(packer.pid)[-1], signal.SIGKILL)
    assert packer.wait(60) == 0
    assert_whole(store, expected)


def test_two_packers_of_one_plan(many_images: Path, dataset: str, expected: list[str]) -> None:
    store = open_store(dataset)
    assert shard_tools("plan", str(many_images), dataset, "--shard-rows", "20").code == 0
    packers = [start("pack", dataset, "--workers", "1", "--seal") for _ in range(2)]
    assert [packer.wait(60) for packer in packers] == [0, 0]
    assert_whole(store, expected)
    # Who lost a race removed what it wrote: only named objects are left.
    snapshot = read_snapshot(store)
    assert {info.key for info in store.list("data")} == {*snapshot.tar, *snapshot.index}


def test_interrupt(many_images: Path, tmp_path: Path) -> None:
    packer = start("pack", str(many_images), str(tmp_path), *SETTINGS)
    while packer.poll() is None and commits(open_store(tmp_path)) < 1:
        time.sleep(0.005)
    workers = children(packer.pid)
    packer.send_signal(signal.SIGINT)
    assert packer.wait(20) == 130
    assert_end(workers)
