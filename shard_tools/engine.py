"""Runs independent tasks in worker processes and survives the death of any of them.

pack, verify and dedup hand their units to `make_engine(…).run(tasks)`. An engine promises one
result a task, each from a complete execution; that nothing is done twice comes from the tasks
themselves, which commit first-wins (see pipeline.manifest).

`Engine` decides what runs next, and is the same everywhere; a `Pool` runs it: processes of this
machine in shard_tools.local_engine, Ray tasks in shard_tools.ray_engine. Copies of stragglers
follow MapReduce's backup tasks (Dean and Ghemawat 2004, section 3.6).
"""

import pickle
import random
import statistics
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from pipeline.errors import AccessDeniedError, CropstreamError, StoreError

Task = TypeVar("Task")
Result = TypeVar("Result")

EngineKind = Literal["local", "ray"]

TASK_ATTEMPTS = 4  # executions of a task that kills its workers
STORE_PAUSES_S = (1.0, 4.0)  # before a task that met a StoreError is executed again
STRAGGLER_S = 5.0  # a task that ends sooner is never copied
STRAGGLER_RATIO = 2.0  # … nor one that takes less than this many median durations
TICK_S = 0.2

_RECENT = 1000  # durations that the median is taken of
_JITTER = (0.5, 1.5)  # of a pause, lest all that failed together come back together


def ignore_counts(images: int, rejected: int) -> None:
    """The default `on_tick`."""


class WorkerDiedError(CropstreamError):
    """A worker process died over a task."""


class _WorkerTracebackError(Exception):
    """Carries a worker's traceback, as text, in the `__cause__` of the error it sent."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


@dataclass(frozen=True)
class Outcome:
    """How an execution ended: with a result, or with an error."""

    result: Any = None
    error: Exception | None = None
    traceback: str = ""


def attempt(work: bytes) -> bytes:
    """Execute a pickled (function, task); the pickled Outcome. Runs in a worker."""
    try:
        function, task = pickle.loads(work)
        return pickle.dumps(Outcome(function(task)))
    except Exception as error:  # noqa: BLE001 - the edge of the process: the parent raises it
        return pickle.dumps(Outcome(None, _portable(error), traceback.format_exc()))


def read_outcome(body: bytes) -> Outcome:
    """What `attempt` returned, its error with the worker's traceback as its cause."""
    outcome: Outcome = pickle.loads(body)
    if outcome.error is not None:
        outcome.error.__cause__ = _WorkerTracebackError(outcome.traceback)
    return outcome


def _portable(error: Exception) -> Exception:
    """The error if it survives pickling, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - a foreign class's pickling may raise anything
        return RuntimeError(f"{type(error).__qualname__}: {error}")
    return error


class Pool(Protocol):
    """Where tasks are executed. What `start` returns stands for the execution."""

    tasks_per_process: int  # started ahead, those that wait for a process included

    def num_processes(self) -> int:
        """How many tasks can run at this moment."""

    def start(self, task: Any) -> Any: ...

    def wait(self, executions: Collection[Any], timeout_s: float) -> list[tuple[Any, Outcome]]:
        """Those of the executions that ended, after a while perhaps none."""

    def cancel(self, execution: Any) -> None:
        """End an execution that nobody needs any more."""

    def totals(self) -> tuple[int, int]:
        """Images processed and rejected so far."""

    def close(self) -> object:
        """End at once whatever still runs."""


class Engine(ABC, Generic[Task, Result]):
    """Calls `function(task)` in worker processes.

    Args:
        function: a module-level function; it, the tasks and the results are pickled, and small.
        workers: how many processes, at least 1; None for as many as there are cores.
        on_tick: called several times a second with (images processed, images rejected) so far.
            Work that was lost or copied may count twice.
        after_death: what to run instead of a task whose worker died, which is told once a death.
        progress_of: (images processed, images rejected) of a result, for an engine whose workers
            cannot `count`.
    """

    def __init__(
        self,
        function: Callable[[Task], Result],
        *,
        workers: int | None,
        on_tick: Callable[[int, int], None] = ignore_counts,
        after_death: Callable[[Task], Task] | None = None,
        progress_of: Callable[[Result], tuple[int, int]] | None = None,
    ) -> None:
        self._function = function
        self._workers = workers
        self._on_tick = on_tick
        self._after_death = after_death
        self._progress_of = progress_of

    @abstractmethod
    def _open(self) -> Pool: ...

    def run(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """The tasks' results, one each, in the order in which they end; tasks are taken as needed.

        A task that met a StoreError other than AccessDeniedError is run 3 times in all, with about
        1 s and 4 s between, in which others run; one whose worker died 4 times. When no task is
        left to start, idle workers run a second copy of those that take long; the first result
        counts, and the other copy is killed.

        Raises a task's last exception, with the worker's traceback as its cause; WorkerDiedError
        if a task keeps killing its workers. However it ends, no worker is left.
        """
        pool = self._open()
        try:
            yield from _Dispatch[Task, Result](pool, tasks, self._after_death).run(self._on_tick)
        finally:
            pool.close()


def make_engine(
    kind: EngineKind,
    function: Callable[[Task], Result],
    *,
    workers: int | None,
    address: str | None = None,
    on_tick: Callable[[int, int], None] = ignore_counts,
    after_death: Callable[[Task], Task] | None = None,
    progress_of: Callable[[Result], tuple[int, int]] | None = None,
) -> Engine[Task, Result]:
    """The engine that a command's `--engine` names; see Engine, and RayEngine for `address`.

    Raises UsageError if Ray is asked for and not installed.
    """
    if kind == "local":
        from shard_tools.local_engine import LocalEngine

        return LocalEngine(
            function,
            workers=workers,
            on_tick=on_tick,
            after_death=after_death,
            progress_of=progress_of,
        )
    from shard_tools.ray_engine import RayEngine

    return RayEngine(
        function,
        address=address,
        workers=workers,
        on_tick=on_tick,
        after_death=after_death,
        progress_of=progress_of,
    )


@dataclass(eq=False)
class _Job(Generic[Task]):
    """A task on its way to its result, and what befell it."""

    task: Task
    started_s: float = 0.0
    executions: list[Any] = field(default_factory=list)
    copied: bool = False
    deaths: int = 0
    failures: int = 0
    not_before_s: float = 0.0


class _Dispatch(Generic[Task, Result]):
    """One run of an engine: which task is executed next, and what becomes of those that ended."""

    def __init__(
        self, pool: Pool, tasks: Iterable[Task], after_death: Callable[[Task], Task] | None
    ) -> None:
        self._pool = pool
        self._fresh = iter(tasks)
        self._after_death = after_death
        self._again: list[_Job[Task]] = []
        self._running: dict[Any, _Job[Task]] = {}  # by execution
        self._durations_s: deque[float] = deque(maxlen=_RECENT)

    def run(self, on_tick: Callable[[int, int], None]) -> Iterator[Result]:
        next_tick = time.monotonic()
        self._start_tasks()
        while self._running or self._again:
            ended = self._wait()
            results = [result for end in ended for result in self._settle(*end)]
            self._start_tasks()  # nobody idles while the caller looks at the results
            if (now := time.monotonic()) >= next_tick or not self._running:
                next_tick = now + TICK_S
                on_tick(*self._pool.totals())
            yield from results

    def _wait(self) -> list[tuple[Any, Outcome]]:
        if self._running:
            return self._pool.wait(self._running.keys(), TICK_S)
        time.sleep(TICK_S)  # all that is left to do pauses
        return []

    def _start_tasks(self) -> None:
        """Keep the pool busy: with tasks while there are any, then with copies of the slowest."""
        processes = self._pool.num_processes()
        while len(self._running) < processes * self._pool.tasks_per_process:
            if (job := self._next()) is None:
                break
            self._start(job)
        while len(self._running) < processes and (straggler := self._straggler()) is not None:
            straggler.copied = True
            self._start(straggler)

    def _next(self) -> _Job[Task] | None:
        now = time.monotonic()
        for number, job in enumerate(self._again):
            if job.not_before_s <= now:
                return self._again.pop(number)
        return next((_Job(task) for task in self._fresh), None)

    def _straggler(self) -> _Job[Task] | None:
        """The task that has run longest, if that is too long."""
        jobs = (job for job in self._running.values() if not job.copied)
        slowest = min(jobs, key=lambda job: job.started_s, default=None)
        if slowest is None or not self._durations_s:
            return None
        patience_s = max(STRAGGLER_S, STRAGGLER_RATIO * statistics.median(self._durations_s))
        return slowest if time.monotonic() - slowest.started_s > patience_s else None

    def _start(self, job: _Job[Task]) -> None:
        if not job.executions:
            job.started_s = time.monotonic()
        execution = self._pool.start(job.task)
        job.executions.append(execution)
        self._running[execution] = job

    def _settle(self, execution: Any, outcome: Outcome) -> Iterator[Result]:
        """Take note of an execution's end; yields the result if there is one."""
        job = self._running.pop(execution, None)
        if job is None:  # both copies ended in the same moment
            return
        job.executions.remove(execution)
        if outcome.error is not None:
            self._retry(job, outcome.error)
            return
        self._durations_s.append(time.monotonic() - job.started_s)
        for loser in job.executions:
            del self._running[loser]
            self._pool.cancel(loser)
        yield outcome.result

    def _retry(self, job: _Job[Task], error: Exception) -> None:
        """Queue a failed task again, unless a copy still runs, or raise its error."""
        if isinstance(error, WorkerDiedError):
            job.deaths += 1
            if job.deaths >= TASK_ATTEMPTS:
                raise self._too_deadly(error)
            job.task = self._after_death(job.task) if self._after_death else job.task
        else:
            transient = isinstance(error, StoreError) and not isinstance(error, AccessDeniedError)
            if not transient or job.failures >= len(STORE_PAUSES_S):
                raise error
            pause_s = STORE_PAUSES_S[job.failures] * random.uniform(*_JITTER)
            job.not_before_s = time.monotonic() + pause_s
            job.failures += 1
        if not job.executions:
            self._again.append(job)

    def _too_deadly(self, error: WorkerDiedError) -> WorkerDiedError:
        return WorkerDiedError(
            f"worker processes died {TASK_ATTEMPTS} times over the same work (the last one: "
            f"{error}), perhaps for want of memory: start again with more of it, or with fewer "
            "--workers; what is committed stays"
        )
