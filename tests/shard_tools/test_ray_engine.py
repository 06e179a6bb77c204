"""A real Ray on two CPUs: what the local engine does, it does too."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CropstreamError, UsageError
from shard_tools import engine, ray_engine
from shard_tools.engine import WorkerDiedError, make_engine
from shard_tools.local_engine import LocalEngine
from shard_tools.ray_engine import RayEngine, connect
from tests.shard_tools.test_engine import (
    PATIENCE_S,
    Deadly,
    be_careful,
    die,
    each_failure,
    fail,
    fail_unpicklably,
    first_time,
    sleep_the_first_time,
    square,
    survive,
)

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def running_ray() -> Iterator[None]:
    """A Ray of two CPUs that an engine started and will stop; the other engines make use of it."""
    results = make_engine("ray", square, workers=2).run([3, 3])
    assert next(results) == 9
    assert ray.is_initialized()
    yield
    assert list(results) == [9]
    assert not ray.is_initialized()


def on_ray(function: Any, **options: Any) -> RayEngine[Any, Any]:
    return RayEngine(function, address=None, workers=2, **options)


def die_in_mid_task(marker: str) -> str:
    """Leave half of the work behind and be killed, the first time."""
    with Path(f"{marker}.work").open("a") as work:
        work.write("half,")
        work.flush()
        if marker.endswith("3") and first_time(marker):
            os.kill(os.getpid(), signal.SIGKILL)
        work.write("whole")
    return Path(f"{marker}.work").name


def read_environment(name: str) -> str | None:
    return os.environ.get(name)


def test_the_worker_that_was_killed_loses_nothing(tmp_path: Path) -> None:
    ends = []
    for place, running in (
        ("ray", on_ray(die_in_mid_task)),
        ("local", LocalEngine[str, str](die_in_mid_task, workers=2)),
    ):
        folder = tmp_path / place
        folder.mkdir()
        results = sorted(running.run(str(folder / str(number)) for number in range(8)))
        ends.append((results, [(folder / name).read_text() for name in results]))
    assert ends[0] == ends[1]
    assert [text.count("half") for text in ends[0][1]] == [1, 1, 1, 2, 1, 1, 1, 1]


def test_a_death_concerns_its_own_task_only() -> None:
    tasks = [Deadly(number, signal.SIGSEGV if number == 3 else None) for number in range(6)]
    results = list(on_ray(survive, after_death=be_careful).run(tasks))
    assert sorted(task.number for task in results) == list(range(6))
    assert [task.number for task in results if task.careful] == [3]


def test_progress_comes_from_the_results() -> None:
    ticks: list[tuple[int, int]] = []
    counting = on_ray(
        square,
        on_tick=lambda *seen: ticks.append(seen),
        progress_of=lambda result: (result, 1),
    )
    assert sorted(counting.run([1, 2, 3])) == [1, 4, 9]
    assert ticks[-1] == (14, 3)


def test_a_task_that_kills_every_worker_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "TASK_ATTEMPTS", 2)  # a new worker takes a second
    with pytest.raises(WorkerDiedError, match=r"died 2 times .* memory"):
        list(on_ray(die).run([7]))


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
        list(on_ray(fail).run([str(folder)]))
    assert type(caught.value) is error
    assert len(list(folder.iterdir())) == tries
    assert "in fail\n" in str(caught.value.__cause__)


def test_what_cannot_be_pickled_is_described() -> None:
    with pytest.raises(RuntimeError, match="UnpicklableError: it went wrong"):
        list(on_ray(fail_unpicklably).run(["it"]))


def test_a_straggler_does_not_hold_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "STRAGGLER_S", 0.3)
    tasks = [str(tmp_path / name) for name in ("slow", "1", "2")]
    assert sorted(on_ray(sleep_the_first_time).run(tasks)) == sorted(tasks)


def test_the_environment_reaches_a_cluster_and_no_log() -> None:
    """A program that joins by address, where the workers do not inherit its environment."""
    secret = "wJalrXUtnFEMI-not-a-real-one"
    program = (
        "import sys\n"
        "from shard_tools.engine import make_engine\n"
        "from tests.shard_tools.test_ray_engine import read_environment\n"
        "joining = make_engine('ray', read_environment, workers=None, address=sys.argv[1])\n"
        "print(*sorted(map(str, joining.run(sys.argv[2:]))))\n"
    )
    names = ("AWS_SECRET_ACCESS_KEY", "OMP_NUM_THREADS", "UNRELATED")
    ended = subprocess.run(
        [sys.executable, "-c", program, ray.get_runtime_context().gcs_address, *names],
        env={**os.environ, "UNRELATED": secret, "AWS_SECRET_ACCESS_KEY": secret}
        | {"OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.stdout.split() == ["3", "None", secret], ended.stderr
    assert ended.stderr == ""
    here = ray.get_runtime_context()
    folder = Path(here.get_temp_dir(), here.get_session_name(), "logs")
    logs = [path for path in folder.rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if secret.encode() in path.read_bytes()]


def test_a_cluster_without_cpus_is_told_of() -> None:
    program = (
        "import ray\n"
        "from shard_tools import ray_engine\n"
        "from tests.shard_tools.test_engine import square\n"
        "ray_engine._NO_CPUS_S = 0.5\n"
        "ticks = iter(range(5))\n"
        "def on_tick(images, rejected):\n"
        "    if next(ticks, None) is None:\n"
        "        raise SystemExit(7)\n"
        "alone = ray_engine.RayEngine(square, address=None, workers=None, on_tick=on_tick)\n"
        "ray.init('local', num_cpus=0, include_dashboard=False, log_to_driver=False)\n"
        "print(list(alone.run([3])))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (7, ""), ended.stderr
    assert ended.stderr.count("the Ray cluster has no CPU to run tasks on") == 1


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense:port"])
def test_no_cluster(address: str) -> None:
    with pytest.raises(UsageError, match=f"no Ray cluster answers at '{address}'"):
        connect(ray, address, None)


def test_a_node_without_our_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "only_here", ray_engine)
    monkeypatch.setattr(ray_engine.attempt_with_environment, "__module__", "only_here")
    with pytest.raises(CropstreamError, match=r"installed on every node.*only_here"):
        list(on_ray(square).run([1]))


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"engine=ray needs Ray: pip install 'cropstream\[ray\]'"):
        make_engine("ray", square, workers=2)
