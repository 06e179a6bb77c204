"""Runs independent tasks in local processes, and survives the death of a worker.

The engine promises only that every task was run to its end at least once; that nothing is done
twice comes from the tasks themselves, which commit their result first-wins (see pipeline.manifest).
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Generic, TypeVar

from pipeline.errors import AccessDeniedError, CropstreamError, StoreError

Task = TypeVar("Task")
Result = TypeVar("Result")

TASK_ATTEMPTS = 3
TASKS_AHEAD = 2  # a worker
TICK_S = 0.2

_SPAWN = multiprocessing.get_context("spawn")  # the store's client does not survive a fork

num_processed: Any = None  # in a worker: shared counter of images, for the progress bar
num_rejected: Any = None


def count(*, rejected: bool) -> None:
    """Count one image for the progress bar; does nothing outside a worker."""
    if num_processed is None:
        return
    with num_processed.get_lock():
        num_processed.value += 1
        num_rejected.value += rejected


class LocalEngine(Generic[Task, Result]):
    """`workers` processes that call `function(task)`.

    Args:
        function: a module-level function; it, the tasks and the results are pickled.
        workers: how many processes, at least 1.
        on_tick: called several times a second with (images processed, images rejected) so far.
    """

    def __init__(
        self,
        function: Callable[[Task], Result],
        *,
        workers: int,
        on_tick: Callable[[int, int], None] = lambda processed, rejected: None,
    ) -> None:
        self._function = function
        self._workers = workers
        self._on_tick = on_tick
        self._counters: tuple[Any, ...] = ()  # of the present pool
        self._before = (0, 0)  # what the pools before it counted
        self._failures: Counter[Task] = Counter()
        self._waiting: deque[Task] = deque()
        self._fresh: Iterator[Task] = iter(())

    def run(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """The tasks' results, in the order in which they end; tasks are taken as needed.

        A task whose worker died, or that met a StoreError, is run again, three times in all. Raises
        the task's last exception, or CropstreamError if it keeps killing its workers.
        """
        self._fresh = iter(tasks)
        while self._look_ahead():
            pool = self._start_pool()
            try:
                yield from self._run_on(pool)
            except BrokenProcessPool:
                continue
            finally:
                _stop(pool)

    def _start_pool(self) -> ProcessPoolExecutor:
        # A worker killed while it counts holds the lock for ever: every pool has its own counters.
        self._before = self._totals()
        self._counters = (_SPAWN.Value("q", 0), _SPAWN.Value("q", 0))
        return ProcessPoolExecutor(
            self._workers,
            mp_context=_SPAWN,
            initializer=_enter_worker,
            initargs=self._counters,
        )

    def _totals(self) -> tuple[int, int]:
        """Images processed and rejected, read without the lock that a dead worker may hold."""
        if not self._counters:
            return self._before
        processed, rejected = (counter.get_obj().value for counter in self._counters)
        return self._before[0] + processed, self._before[1] + rejected

    def _run_on(self, pool: ProcessPoolExecutor) -> Iterator[Result]:
        running: dict[Future[Result], Task] = {}
        try:
            while self._look_ahead() or running:
                self._submit(pool, running)
                done, _ = wait(running, timeout=TICK_S, return_when=FIRST_COMPLETED)
                self._on_tick(*self._totals())
                for future in done:
                    if (error := future.exception()) is None:
                        yield future.result()
                    elif isinstance(error, BrokenProcessPool):
                        raise error
                    else:
                        self._retry(running[future], error)
                    del running[future]
        except BrokenProcessPool:
            # Which task killed its worker nobody knows: all that were running count as suspects.
            for task in running.values():
                self._retry(task, _died(self._workers))
            raise

    def _look_ahead(self) -> bool:
        """Whether there is a task to start, which is then the first of those waiting."""
        if not self._waiting:
            self._waiting.extend(islice(self._fresh, 1))
        return bool(self._waiting)

    def _submit(self, pool: ProcessPoolExecutor, running: dict[Future[Result], Task]) -> None:
        while len(running) < TASKS_AHEAD * self._workers and self._look_ahead():
            task = self._waiting[0]
            running[pool.submit(self._function, task)] = task  # raises if the pool is broken
            self._waiting.popleft()

    def _retry(self, task: Task, error: BaseException) -> None:
        """Queue a failed task again, or raise its error."""
        self._failures[task] += 1
        final = isinstance(error, AccessDeniedError) or not isinstance(
            error, StoreError | _WorkerDiedError
        )
        if final or self._failures[task] >= TASK_ATTEMPTS:
            raise error
        self._waiting.append(task)


class _WorkerDiedError(CropstreamError):
    """A worker process died."""


def _died(workers: int) -> _WorkerDiedError:
    return _WorkerDiedError(
        f"worker processes died {TASK_ATTEMPTS} times over the same work, perhaps for want of "
        f"memory: start again with fewer than {workers} --workers; what is committed stays"
    )


def _enter_worker(processed: Any, rejected: Any) -> None:
    global num_processed, num_rejected
    num_processed, num_rejected = processed, rejected
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A worker waits on a queue that its siblings hold open: orphaned, it would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the pool now, whatever its workers are doing: their uncommitted work does not count."""
    processes = list((pool._processes or {}).values())  # no public way before Python 3.14
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()
