"""A disk cache that several processes share and nobody trusts."""

import errno
import logging
import multiprocessing
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cache import RangeCache
from pipeline.errors import UsageError
from pipeline.telemetry import Telemetry

BODY = random.Random(1).randbytes(10_000)
SHARD = bytes(range(32))
ENTRY_BYTES = len(BODY) + 4


def cache_of(folder: Path, *, entries: float = 100) -> RangeCache:
    return RangeCache(str(folder), round(entries * ENTRY_BYTES), Telemetry())


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("??/*"))


def held_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in entries(folder))


def age(folder: Path, seconds: float) -> None:
    """As if everything there had last been used so long ago, the first ranges first."""
    for number, path in enumerate(entries(folder)):
        then = path.stat().st_mtime - seconds + number
        os.utime(path, (then, then))


def test_ranges_come_back(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "new" / "folder")
    cache.put(SHARD, 5, BODY)
    for opened in (cache, cache_of(tmp_path / "new" / "folder")):
        assert opened.get(SHARD, 5, len(BODY)) == BODY
        assert opened.get(SHARD, 5, len(BODY) - 1) is None
        assert opened.get(SHARD, 4, len(BODY)) is None
        assert opened.get(bytes(32), 5, len(BODY)) is None
    assert cache._telemetry.take() == {"cache_hits": 1, "cache_hit_bytes": len(BODY)}


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty"])
def test_a_damaged_entry_is_removed(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache_of(tmp_path).put(SHARD, 0, BODY)
    (entry,) = entries(tmp_path)
    stored = entry.read_bytes()
    damaged = {
        "flip": stored[:999] + bytes([stored[999] ^ 1]) + stored[1000:],
        "cut": stored[:-1],
        "grow": stored + b"x",
        "empty": b"",
    }
    entry.write_bytes(damaged[damage])
    cache = cache_of(tmp_path)
    assert cache.get(SHARD, 0, len(BODY)) is None
    assert not entries(tmp_path)
    cache.put(SHARD, 0, BODY)
    assert cache.get(SHARD, 0, len(BODY)) == BODY
    cache.remove(SHARD, 0, len(BODY))
    assert not entries(tmp_path)
    (record,) = caplog.records
    assert f"{entry} is damaged" in record.getMessage()


def test_what_this_run_has_used_stays_and_the_rest_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_of(tmp_path, entries=3.5)
    for number in range(6):
        cache.put(SHARD, number, BODY)
    found = [cache.get(SHARD, number, len(BODY)) is not None for number in range(6)]
    assert found == [True] * 3 + [False] * 3
    assert cache._telemetry.total("cache_refused") == 3
    (record,) = caplog.records
    assert f"fetch.cache_bytes={round(3.5 * ENTRY_BYTES)}" in record.getMessage()


def test_what_earlier_runs_left_goes_oldest_first(tmp_path: Path) -> None:
    earlier = cache_of(tmp_path)
    for number in range(4):
        earlier.put(SHARD, number, BODY)
    age(tmp_path, 1000)
    cache = cache_of(tmp_path, entries=4.5)
    assert cache.get(SHARD, 0, len(BODY)) == BODY  # the oldest, but used now
    for number in range(4, 9):
        cache.put(SHARD, number, BODY)
    kept = {int(path.name.split("-")[1]) for path in entries(tmp_path)}
    assert kept == {0, 4, 5, 6}
    assert cache._telemetry.total("cache_refused") == 2


def test_a_smaller_budget_holds_at_once(tmp_path: Path) -> None:
    earlier = cache_of(tmp_path)
    for number in range(6):
        earlier.put(SHARD, number, BODY)
    age(tmp_path, 1000)
    cache = cache_of(tmp_path, entries=2.5)
    cache.put(SHARD, 9, BODY)
    assert held_bytes(tmp_path) <= 2.5 * ENTRY_BYTES
    assert cache.get(SHARD, 9, len(BODY)) == BODY


def fill(folder: str, shard: int) -> None:
    cache = cache_of(Path(folder), entries=20.5)
    for number in range(15):
        cache.put(bytes([shard]) * 32, number, BODY)
        cache.put(SHARD, number, BODY)
        assert cache.get(SHARD, number, len(BODY)) in (BODY, None)


def test_processes_share_one_budget(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=fill, args=(str(tmp_path), i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert 18 * ENTRY_BYTES <= held_bytes(tmp_path) <= 20.5 * ENTRY_BYTES
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("process", [os.getppid(), 2**22])  # one that lives, and none
def test_what_a_killed_process_left_is_put_right_an_hour_later(
    tmp_path: Path, process: int
) -> None:
    """Not earlier: whether a process of another machine lives cannot be seen here."""
    cache_of(tmp_path).put(SHARD, 0, BODY)
    parts = [tmp_path / f".{process}-{number}.part" for number in range(2)]
    for part in parts:
        part.write_bytes(BODY)
    then = parts[0].stat().st_mtime - 3700
    os.utime(parts[0], (then, then))
    (tmp_path / "bytes").write_bytes((10**15).to_bytes(8, "little"))  # reserved, never written
    cache = cache_of(tmp_path, entries=3.5)
    assert list(tmp_path.glob(".*")) == parts[1:]
    cache.put(SHARD, 1, BODY)
    assert cache.get(SHARD, 1, len(BODY)) == BODY


KILLED_WHILE_WRITING = """
import os, sys
os.getpid = lambda: 7  # as in two containers
from pipeline.cache import RangeCache
from pipeline.telemetry import Telemetry

class Killed(RangeCache):
    def _write(self, part, name, body):
        os._exit(0)

Killed(sys.argv[1], 10**6, Telemetry()).put(bytes(32), 0, b"body")
"""


def test_processes_of_one_number_write_different_files(tmp_path: Path) -> None:
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)], check=True)
    assert len(list(tmp_path.glob(".*.part"))) == 2


class Overtaken(RangeCache):
    """Another process puts the same range while this one writes it."""

    def _reserve(self, part: Path, size: int) -> bool:
        fits = super()._reserve(part, size)
        cache_of(self._folder).put(SHARD, 0, BODY)
        return fits


def test_a_range_that_two_processes_put_counts_once(tmp_path: Path) -> None:
    cache = Overtaken(str(tmp_path), 10**6, Telemetry())
    cache.put(SHARD, 0, BODY)
    assert int.from_bytes((tmp_path / "bytes").read_bytes(), "little") == held_bytes(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert cache.get(SHARD, 0, len(BODY)) == BODY


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"fetch\.cache_dir.*file"):
            cache_of(folder)


def test_a_full_disk_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = cache_of(tmp_path)
    cache.put(SHARD, 0, BODY)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # write() fails behind 5000 bytes
    try:
        with caplog.at_level(logging.WARNING):
            for number in range(1, 4):
                cache.put(SHARD, number, BODY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (record,) = caplog.records
    assert os.strerror(errno.EFBIG) in record.getMessage()
    assert "the rest is read from the store" in record.getMessage()
    assert cache.get(SHARD, 0, len(BODY)) == BODY
    assert not list(tmp_path.glob(".*"))
    assert held_bytes(tmp_path) == ENTRY_BYTES
