"""Local processes: results arrive, failures end the run, deaths do not."""

import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.errors import AccessDeniedError, CropstreamError, ShardError, StoreError
from shard_tools import engine
from shard_tools.engine import TASK_ATTEMPTS, LocalEngine


def square(number: int) -> int:
    return number * number


def die_once(marker: str) -> str:
    """Kill this worker, the first time it is asked to."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker


def die(task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def die_counting(marker: str) -> str:
    """Count an image, then be killed while counting the next, the first time."""
    engine.count(rejected=False)
    if not Path(marker).exists():
        Path(marker).touch()
        engine.num_processed.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker


def fail(folder: str) -> str:
    """Fail as the folder's name says; leave a file for every try."""
    Path(folder, str(time.monotonic_ns())).touch()
    errors = {"store": StoreError, "access": AccessDeniedError, "shard": ShardError}
    raise errors[Path(folder).name](f"failed on {folder}")


def test_results() -> None:
    assert sorted(LocalEngine(square, workers=2).run(range(50))) == sorted(n * n for n in range(50))
    assert list(LocalEngine(square, workers=1).run([])) == []


def test_a_worker_that_dies_loses_nothing(tmp_path: Path) -> None:
    tasks = [str(tmp_path / str(number)) for number in (1, 2)]
    assert sorted(LocalEngine(die_once, workers=1).run(tasks)) == tasks


def test_a_worker_that_dies_while_it_counts(tmp_path: Path) -> None:
    ticks: list[tuple[int, int]] = []
    counting = LocalEngine(die_counting, workers=1, on_tick=lambda *seen: ticks.append(seen))
    assert list(counting.run([str(tmp_path / "1")])) == [str(tmp_path / "1")]
    assert ticks[-1] == (2, 0)


def test_a_task_that_kills_every_worker_ends_the_run() -> None:
    with pytest.raises(CropstreamError, match="worker processes died"):
        list(LocalEngine(die, workers=1).run([1]))


@pytest.mark.parametrize(
    ("name", "error", "tries"),
    [
        ("store", StoreError, TASK_ATTEMPTS),
        ("access", AccessDeniedError, 1),
        ("shard", ShardError, 1),
    ],
)
def test_failures(tmp_path: Path, name: str, error: type[Exception], tries: int) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with pytest.raises(error, match="failed on"):
        list(LocalEngine(fail, workers=1).run([str(folder)]))
    assert len(list(folder.iterdir())) == tries
