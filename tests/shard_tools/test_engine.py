"""Local processes: one result a task, whatever befalls the workers; only errors end a run."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline.errors import AccessDeniedError, ShardError, StoreError
from shard_tools import engine
from shard_tools.engine import (
    STORE_PAUSES_S,
    TASK_ATTEMPTS,
    WorkerDiedError,
    make_engine,
)
from shard_tools.local_engine import LocalEngine, count

PATIENCE_S = 60.0  # what sleeps as long is killed, or the test fails


def square(number: int) -> int:
    return number * number


def first_time(marker: str) -> bool:
    """Whether this is the first execution of the task with that marker file."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True)
class Deadly:
    """A task that is killed by a signal unless it is careful."""

    number: int
    killed_by: signal.Signals | None = None
    careful: bool = False


def be_careful(task: Deadly) -> Deadly:
    return replace(task, careful=True)


def survive(task: Deadly) -> Deadly:
    if task.killed_by is not None and not task.careful:
        os.kill(os.getpid(), task.killed_by)
    return task


def die(task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def leave(task: int) -> int:
    raise SystemExit(task)


def die_counting(marker: str) -> str:
    """Count two images, and be killed the first time."""
    count(images=2, rejected=True)
    if first_time(marker):
        os.kill(os.getpid(), signal.SIGKILL)
    return marker


def sleep_the_first_time(marker: str) -> str:
    if Path(marker).name.startswith("slow") and first_time(marker):
        time.sleep(PATIENCE_S)
        raise AssertionError("the straggler was waited for")
    return marker


def sleep_once_then_die(marker: str) -> str:
    """A straggler whose copy dies while the original goes on to its end."""
    if Path(marker).name == "slow":
        if first_time(marker):
            while not Path(f"{marker}.copy").exists():
                time.sleep(0.01)
            time.sleep(0.3)
        else:
            Path(f"{marker}.copy").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return marker


def wait_for(path: Path) -> None:
    wait_until(path.exists)


def die_after_the_result(marker: str) -> str:
    """Where the name says so, be killed as soon as the result is sent; see the test."""
    with Path(marker).open("a") as file:
        file.write("x")
    if Path(marker).name == "doomed":
        wait_for(Path(f"{marker}.go"))
        threading.Thread(target=die_when_idle, args=[threading.get_ident()]).start()
    return marker


def die_when_idle(worker: int) -> None:
    """Be killed when that thread has nothing to do but to receive the next task."""
    while sys._current_frames()[worker].f_code.co_name != "_recv":
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def stay_or_return(marker: str) -> str:
    """Where the name says so, stay until killed, the first time."""
    if Path(marker).name == "doomed" and first_time(marker):
        time.sleep(PATIENCE_S)
    return marker


def end_with_its_copy(marker: str) -> str:
    """A straggler that ends in the moment in which its copy dies; see the test."""
    if Path(marker).name == "slow":
        is_copy = not first_time(f"{marker}.original")
        if is_copy:
            Path(f"{marker}.copy").touch()
        wait_for(Path(f"{marker}.go"))
        if is_copy:
            os.kill(os.getpid(), signal.SIGKILL)
    return marker


def need_the_other(marker: str) -> str:
    """Like a store that is back after a while: "early" fails until "late" was there."""
    if Path(marker).name == "early" and not Path(marker).with_name("late").exists():
        raise StoreError("not yet")
    Path(marker).touch()
    return marker


def fail(folder: str) -> str:
    """Fail as the folder's name says; leave a file for every try."""
    Path(folder, str(time.monotonic_ns())).touch()
    errors = {
        "store": StoreError,
        "access": AccessDeniedError,
        "shard": ShardError,
        "bug": ZeroDivisionError,
    }
    raise errors[Path(folder).name](f"failed on {folder}")


class UnpicklableError(Exception):
    def __init__(self, what: str, callback: Callable[[], None]) -> None:
        super().__init__(f"{what} went wrong")
        self.callback = callback


def fail_unpicklably(what: str) -> None:
    raise UnpicklableError(what, lambda: None)


def return_a_lambda(task: int) -> Callable[[], int]:
    return lambda: task


def process_id(task: float) -> int:
    time.sleep(task)
    return os.getpid()


def sign(folder: str) -> int:
    Path(folder, str(os.getpid())).touch()
    return os.getpid()


def stay(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(PATIENCE_S)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_results() -> None:
    assert sorted(LocalEngine(square, workers=2).run(range(50))) == [n * n for n in range(50)]
    assert list(LocalEngine(square, workers=1).run([])) == []


def test_an_engine_by_name() -> None:
    ours = make_engine("local", square, workers=None)
    assert isinstance(ours, LocalEngine)
    assert list(ours.run([3])) == [9]


def test_tasks_are_taken_as_needed() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = LocalEngine(square, workers=2).run(tasks())
    for seen in range(1, 11):
        next(results)
        assert len(taken) <= seen + 4  # two that run, two that ended together
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGSEGV, signal.SIGALRM])
def test_a_death_concerns_its_own_task_only(deadly: signal.Signals) -> None:
    tasks = [Deadly(number, deadly if number == 3 else None) for number in range(8)]
    running = LocalEngine(survive, workers=2, after_death=be_careful)
    results = sorted(running.run(tasks), key=lambda task: task.number)
    assert [task.careful for task in results] == [number == 3 for number in range(8)]


def test_counts_survive_their_worker(tmp_path: Path) -> None:
    ticks: list[tuple[int, int]] = []
    counting = LocalEngine(die_counting, workers=1, on_tick=lambda *seen: ticks.append(seen))
    tasks = [str(tmp_path / "1"), str(tmp_path / "2")]
    assert sorted(counting.run(tasks)) == tasks
    assert ticks[-1] == (8, 4)


def test_counting_outside_a_worker_does_nothing() -> None:
    count(rejected=True)


@pytest.mark.parametrize(("function", "how"), [(die, "signal 9, Killed"), (leave, "exit code 7")])
def test_a_task_that_kills_every_worker_ends_the_run(
    function: Callable[[int], int], how: str
) -> None:
    told: list[int] = []

    def after_death(task: int) -> int:
        told.append(task)
        return task

    with pytest.raises(WorkerDiedError, match=rf"died 4 times .*{how}.* memory"):
        list(LocalEngine(function, workers=1, after_death=after_death).run([7]))
    assert told == [7] * (TASK_ATTEMPTS - 1)


each_failure = pytest.mark.parametrize(
    ("name", "error", "tries"),
    [
        ("store", StoreError, 1 + len(STORE_PAUSES_S)),
        ("access", AccessDeniedError, 1),
        ("shard", ShardError, 1),
        ("bug", ZeroDivisionError, 1),
    ],
)


@each_failure
def test_failures(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: type[Exception],
    tries: int,
) -> None:
    monkeypatch.setattr(engine, "STORE_PAUSES_S", (0.1, 0.1))
    folder = tmp_path / name
    folder.mkdir()
    with pytest.raises(error, match="failed on") as caught:
        list(LocalEngine(fail, workers=1).run([str(folder)]))
    assert len(list(folder.iterdir())) == tries
    assert "in fail\n" in str(caught.value.__cause__)


def test_a_task_that_met_a_store_error_pauses_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "STORE_PAUSES_S", (2.0, 2.0))
    tasks = [str(tmp_path / name) for name in ("early", "1", "2", "late")]
    assert list(LocalEngine(need_the_other, workers=1).run(tasks)) == [*tasks[1:], tasks[0]]


def test_what_cannot_be_pickled_is_described() -> None:
    with pytest.raises(RuntimeError, match="UnpicklableError: it went wrong") as caught:
        list(LocalEngine(fail_unpicklably, workers=1).run(["it"]))
    assert "in fail_unpicklably\n" in str(caught.value.__cause__)
    with pytest.raises(Exception, match=r"[Cc]an't (get|pickle) local object"):
        list(LocalEngine(return_a_lambda, workers=1).run([1]))


def test_a_straggler_does_not_hold_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "STRAGGLER_S", 0.3)
    tasks = [str(tmp_path / name) for name in ("slow", "1", "2", "slow too")]
    assert sorted(LocalEngine(sleep_the_first_time, workers=3).run(tasks)) == sorted(tasks)


def test_a_copy_that_dies_leaves_the_original_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "STRAGGLER_S", 0.3)
    tasks = [str(tmp_path / name) for name in ("slow", "1")]
    assert sorted(LocalEngine(sleep_once_then_die, workers=2).run(tasks)) == sorted(tasks)


def test_an_idle_worker_that_died_is_replaced(tmp_path: Path) -> None:
    def tasks() -> Iterator[str]:
        yield str(tmp_path)
        (first,) = (int(path.name) for path in tmp_path.iterdir())
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not multiprocessing.active_children())
        yield str(tmp_path)

    def after_death(task: str) -> str:
        raise AssertionError("no task was running when the worker died")

    workers = list(LocalEngine(sign, workers=1, after_death=after_death).run(tasks()))
    assert len(set(workers)) == 2


def test_a_busy_worker_that_died_is_not_forgotten(tmp_path: Path) -> None:
    """A kill between a result and the next start: the task of the dead is still to be settled."""
    doomed = tmp_path / "doomed"

    def tasks() -> Iterator[str]:
        yield str(doomed)
        yield str(tmp_path / "1")
        wait_for(doomed)
        for worker in multiprocessing.active_children():  # one busy, one idle
            worker.kill()
        wait_until(lambda: not multiprocessing.active_children())
        yield str(tmp_path / "2")

    told: list[str] = []

    def after_death(task: str) -> str:
        told.append(task)
        return task

    results = LocalEngine(stay_or_return, workers=2, after_death=after_death).run(tasks())
    assert sorted(results) == [str(tmp_path / name) for name in ("1", "2", "doomed")]
    assert told == [str(doomed)]


def test_the_result_of_a_worker_that_died_then_counts(tmp_path: Path) -> None:
    doomed = tmp_path / "doomed"

    def tasks() -> Iterator[str]:
        yield str(doomed)
        yield str(tmp_path / "1")
        wait_for(doomed)
        Path(f"{doomed}.go").touch()
        wait_until(lambda: len(multiprocessing.active_children()) == 1)
        yield str(tmp_path / "2")

    results = LocalEngine(die_after_the_result, workers=2).run(tasks())
    assert sorted(results) == [str(tmp_path / name) for name in ("1", "2", "doomed")]
    assert doomed.read_text() == "x"


def test_a_copy_that_dies_in_the_moment_of_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "STRAGGLER_S", 0.3)
    go = tmp_path / "slow.go"

    def on_tick(images: int, rejected: int) -> None:
        if (tmp_path / "slow.copy").exists() and not go.exists():
            go.touch()
            wait_until(lambda: len(multiprocessing.active_children()) == 1)
            time.sleep(0.3)  # for the original's result to arrive as well

    tasks = [str(tmp_path / name) for name in ("slow", "1")]
    results = LocalEngine(end_with_its_copy, workers=2, on_tick=on_tick).run(tasks)
    assert sorted(results) == sorted(tasks)
    assert go.exists()


def test_no_worker_is_left_when_the_results_are_given_up(tmp_path: Path) -> None:
    results = LocalEngine(process_id, workers=2).run([0.0, PATIENCE_S])
    worker = next(results)
    assert is_alive(worker)
    results.close()  # type: ignore[attr-defined]
    assert not is_alive(worker)


STAY = """
import sys
from shard_tools.local_engine import LocalEngine
from tests.shard_tools.test_engine import stay
results = LocalEngine(stay, workers=2).run([sys.argv[1]] * 2)
next(results)
"""


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path: Path, ending: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", STAY, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    if ending is signal.SIGINT:
        os.killpg(parent.pid, ending)  # as a terminal does: the workers get it too
    else:
        parent.kill()
    errors = parent.communicate(timeout=PATIENCE_S)[1]
    wait_until(lambda: not any(map(is_alive, workers)))
    assert errors.count("KeyboardInterrupt") == (ending is signal.SIGINT)


def test_a_program_ends_with_results_not_asked_for() -> None:
    """Its exit would wait for the workers, and they for their tasks."""
    program = (
        "from shard_tools.local_engine import LocalEngine\n"
        "from tests.shard_tools.test_engine import square\n"
        "results = LocalEngine(square, workers=2).run(range(9))\n"
        "print(next(results) in (0, 1))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


def test_starting_a_worker_imports_nothing_heavy() -> None:
    (modules,) = LocalEngine(eval, workers=1).run(["set(__import__('sys').modules)"])
    assert "shard_tools.engine" in modules
    assert not modules & {"torch", "numpy", "pyarrow", "ray"}
