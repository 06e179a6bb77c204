"""Worker processes of this machine: pack's and verify's ordinary engine.

What runs next is decided in shard_tools.engine. concurrent.futures would not do for the rest: when
one worker dies its ProcessPoolExecutor fails every task in flight, and nobody learns which of them
was deadly.
"""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from pipeline.cores import usable_cores
from shard_tools.engine import (
    Engine,
    Outcome,
    Pool,
    Result,
    Task,
    WorkerDiedError,
    attempt,
    read_outcome,
)

_JOIN_S = 5.0

_SPAWN = multiprocessing.get_context("spawn")  # the store's client does not survive a fork

# In a worker, its own two fields of the shared counts: one writer, so no lock for the dead to hold.
_counts: Any = None
_images_slot = 0


def count(*, images: int = 1, rejected: int = 0) -> None:
    """Count images for the progress bar, `rejected` of them rejected (True counts as 1).

    To be called by one thread of a worker; does nothing anywhere else.
    """
    if _counts is not None:
        _counts[_images_slot] += images
        _counts[_images_slot + 1] += rejected


class LocalEngine(Engine[Task, Result]):
    """Runs tasks in processes of this machine; `progress_of` is not needed."""

    def _open(self) -> Pool:
        return _LocalPool(self._function, self._workers or usable_cores())


@dataclass(eq=False)
class _Worker:
    """A process and the parent's end of its pipe."""

    process: SpawnProcess
    pipe: Connection
    slot: int
    busy: bool = False

    def receive(self) -> Outcome:
        """What came through the pipe."""
        try:
            body = self.pipe.recv_bytes()
        except (EOFError, OSError):  # its end, or a reset if the task was never read
            return self.died()
        self.busy = False
        return read_outcome(body)

    def died(self) -> Outcome:
        self.process.join(_JOIN_S)
        return Outcome(error=WorkerDiedError(_describe_end(self.process.exitcode)))


class _LocalPool:
    """Spawned processes, one task at a time each, started when there is work for them."""

    tasks_per_process = 1  # the next task is handed over in some 100 µs

    def __init__(self, function: Callable[[Any], Any], num_workers: int) -> None:
        self._function = function
        self._num_workers = num_workers
        self._counts = _SPAWN.RawArray("q", 2 * num_workers)
        self._workers: list[_Worker] = []
        # Also at the interpreter's exit: multiprocessing would wait for the workers for ever.
        self.close = weakref.finalize(self, _kill, self._workers)

    def num_processes(self) -> int:
        return self._num_workers

    def start(self, task: Any) -> _Worker:
        worker = self._idle_worker()
        worker.busy = True
        with suppress(OSError):  # it died in this moment, as wait() will find
            worker.pipe.send_bytes(pickle.dumps((self._function, task)))
        return worker

    def wait(self, workers: Collection[_Worker], timeout_s: float) -> list[tuple[_Worker, Outcome]]:
        # Both: a pipe does not end while a child that the dead worker forked holds it open.
        sentinels = [worker.process.sentinel for worker in workers]
        pipes = [worker.pipe for worker in workers]
        ready = set(multiprocessing.connection.wait([*pipes, *sentinels], timeout_s))
        ended = []
        for worker in workers:
            if worker.pipe in ready:
                ended.append((worker, worker.receive()))
            elif worker.process.sentinel in ready:
                ended.append((worker, worker.died()))
        self._remove([w for w, outcome in ended if isinstance(outcome.error, WorkerDiedError)])
        return ended

    def cancel(self, worker: _Worker) -> None:
        self._remove([worker])

    def totals(self) -> tuple[int, int]:
        return sum(self._counts[::2]), sum(self._counts[1::2])

    def _idle_worker(self) -> _Worker:
        idle = [worker for worker in self._workers if not worker.busy]
        self._remove([worker for worker in idle if not worker.process.is_alive()])
        # Dead or alive, the busy ones are wait's: a result may still lie in a dead one's pipe.
        idle = [worker for worker in self._workers if not worker.busy]
        return idle[0] if idle else self._start_worker()

    def _remove(self, workers: list[_Worker]) -> None:
        """End workers, unless they are removed already: one may die while its copy is settled."""
        ours = [worker for worker in self._workers if worker in workers]
        self._workers[:] = [worker for worker in self._workers if worker not in ours]
        _kill(ours)

    def _start_worker(self) -> _Worker:
        taken = {worker.slot for worker in self._workers}
        slot = next(slot for slot in range(self._num_workers) if slot not in taken)
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_work, args=(theirs, self._counts, slot))
        with theirs, _sigint_blocked():
            process.start()
        worker = _Worker(process, ours, slot)
        self._workers.append(worker)
        return worker


def _work(pipe: Connection, counts: Any, slot: int) -> None:
    """A worker's life: one task after the other, until the pipe or the parent ends."""
    global _counts, _images_slot
    _counts, _images_slot = counts, 2 * slot
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(attempt(pipe.recv_bytes()))


def _die_with_parent() -> None:
    """An orphan that is busy would work on for nobody, and commit behind its successor's back."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _kill(workers: list[_Worker]) -> None:
    """End workers now, whatever they are doing: what they have not committed does not count."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        worker.process.close()
        worker.pipe.close()


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """A process started here never sees Ctrl-C, which is the parent's to handle."""
    resource_tracker.ensure_running()  # its first start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _describe_end(exit_code: int | None) -> str:
    if exit_code is None:
        return "closed its pipe"
    if exit_code < 0:
        return f"killed by signal {-exit_code}, {signal.strsignal(-exit_code)}"
    return f"exit code {exit_code}"
