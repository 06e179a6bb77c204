"""A rank's loader workers: started, watched, replaced when they die, ended.

Called by pipeline.loader. A worker is a process (pipeline.worker) at the other end of a socket
pair; two kinds of threads look after it here. One listens to it, and starts another in its place
when the line goes dead; one looks at the pulses of all, and kills a worker whose heart has stopped
or that has had one image in its hands for too long. So a worker that dies of an image, of memory
or by a signal costs its unfinished batches and a second, whatever the training loop does just then.

What its threads held when it ended are suspects: the successor tries each in a process of its own
first (pipeline.probe), and what crashes that, or does not end there, is a bad sample like others,
so the batches stay those of the data. A successor that dies meanwhile hands its suspects on. One
that dies three times without finishing a batch ends the run, with what it held.

With `in_process` the same code runs in threads of this process, for tests and debuggers; then
nobody can replace it.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from socket import SHUT_RDWR, socket, socketpair

from pipeline.batches import Share
from pipeline.errors import DataError, StoppedWaiting, UsageError
from pipeline.messages import Assignment, Condemned, Done, Failed
from pipeline.ranges import READER_ENVIRONMENT
from pipeline.ring import Ring
from pipeline.telemetry import Telemetry
from pipeline.worker import receive, serve

_MAX_DEATHS = 3  # in a row, without a batch between them
_START_LIMIT_S = 120.0  # for a worker to import what it needs, on a slow file system too
_LOOK_S = 0.5  # between two looks at the pulses
_GLANCE_S = 0.1  # while the loop waits, between two looks whether it still wants to
_END_LIMIT_S = 5.0  # for a worker to end by itself once its socket is closed

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

_log = logging.getLogger(__name__)


class Workers:
    """The workers of one rank, from one step of the run on; steps count from its beginning.

    Args:
        shares: of each worker.
        ring: the memory of all; nobody else may close it before `close`.
        rank: for messages.
        num_steps: of an epoch, for messages.

    `allow` steps, then `wait` for them in turn.
    """

    def __init__(
        self,
        shares: Sequence[Share],
        ring: Ring,
        *,
        step: int,
        in_process: bool,
        decode_timeout_s: float,
        telemetry: Telemetry,
        rank: int,
        num_steps: int,
    ) -> None:
        self._ring = ring
        self._timeout_s = decode_timeout_s
        self._telemetry = telemetry
        self._rank = rank
        self._num_steps = num_steps
        self._limit = step
        self._done: dict[int, dict[int, Done]] = defaultdict(dict)
        self._failure: BaseException | None = None
        self._news = threading.Condition()
        self._closing = threading.Event()
        self._pid = os.getpid()
        self._threads: list[threading.Thread] = []
        kind = _ThreadWorker if in_process else _ProcessWorker
        self._workers = [kind(number, share, step) for number, share in enumerate(shares)]
        try:
            for worker in self._workers:
                self._begin(self._listen, worker)
            if not in_process:
                self._begin(self._watch)
        except BaseException:
            self.close()
            raise

    def allow(self, limit: int) -> None:
        """Let the steps before `limit` be filled: their slots are free."""
        with self._news:
            if limit <= self._limit:
                return
            self._limit = limit
            for worker in self._workers:
                worker.send(limit)

    def is_done(self, step: int) -> bool:
        """Whether `wait` would return at once."""
        with self._news:
            return len(self._done[step]) == len(self._workers)

    def wait(self, step: int, is_stopped: Callable[[], bool] = lambda: False) -> list[Done]:
        """Wait for a step, and return what every worker has to tell of it, once.

        Raises what made a worker fail, DataError for one that dies again and again, and
        StoppedWaiting when `is_stopped` says so meanwhile.
        """
        with self._news:
            while self._closing.is_set() or len(self._done[step]) < len(self._workers):
                if self._failure is not None:
                    raise self._failure
                if is_stopped():
                    raise StoppedWaiting
                self._news.wait(_GLANCE_S)
            done = self._done.pop(step)
        return [done[worker.number] for worker in self._workers]

    def close(self) -> None:
        """End all workers and wait for their end; more than once is no error.

        In a process that was forked off it does nothing: the workers are not that one's. One of our
        own threads (a garbage collection can happen anywhere) waits for nobody.
        """
        if os.getpid() != self._pid:
            return
        self._fail(UsageError("this iteration has ended: the loader was closed or begun again"))
        self._closing.set()
        for worker in self._workers:
            worker.hang_up()
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()

    def _begin(self, function: Callable[..., None], *args: object) -> None:
        def run() -> None:
            try:
                function(*args)
            except BaseException as error:  # noqa: BLE001 - the edge of a thread: the loop is told
                self._fail(error)

        thread = threading.Thread(target=run, name="workers", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _start(self, worker: "_Worker") -> None:
        with self._news:  # what a predecessor finished out of turn is written once more
            for step, done in self._done.items():
                if step >= worker.step:
                    done.pop(worker.number, None)
        worker.start(self._ring, self._timeout_s)
        with self._news:
            worker.send(self._limit)

    def _listen(self, worker: "_Worker") -> None:
        """Look after a worker from its start to its end."""
        try:
            self._converse(worker)
        finally:
            worker.hang_up()
            worker.end()

    def _converse(self, worker: "_Worker") -> None:
        """Start a worker and take what it sends; replace it whenever it is gone."""
        self._start(worker)
        while not self._closing.is_set():
            try:
                self._hear(worker, worker.receive())
            except (EOFError, OSError):
                if self._closing.is_set() or self._failure is not None:
                    return
                self._replace(worker)

    def _hear(self, worker: "_Worker", message: object) -> None:
        if isinstance(message, Failed):
            self._fail(message.error)
        elif isinstance(message, Condemned):
            known = (*worker.share.known, *message.bad)
            worker.share = replace(worker.share, known=known)
            worker.suspects = ()
        elif isinstance(message, Done):
            spans = [s._replace(thread=f"worker {worker.number}/{s.thread}") for s in message.spans]
            self._telemetry.merge(message.sums, spans)
            worker.finish(message.step)
            with self._news:
                self._done[message.step][worker.number] = message
                self._news.notify_all()

    def _replace(self, worker: "_Worker") -> None:
        """Start another in the place of one that is gone, unless too many have died there."""
        why = worker.bury()
        numbers = [held.number for held in self._ring.pulse(worker.number).in_hand()]
        worker.suspects = tuple(dict.fromkeys((*worker.suspects, *numbers)))
        suspects = ", ".join(map(str, worker.suspects))
        epoch, step = divmod(worker.step, self._num_steps)
        where = (
            f"loader worker {worker.number} of rank {self._rank} (lanes {worker.share.lanes.start} "
            f"to {worker.share.lanes.stop - 1}) {why} at step {step} of epoch {epoch}, decoding "
            f"{f'samples {suspects}' if suspects else 'nothing'} of {_names(worker.share)}"
        )
        self._telemetry.add(worker_restarts=1)
        if worker.deaths >= _MAX_DEATHS:
            raise DataError(
                f"{where}; it died {worker.deaths} times without finishing a batch. If memory was "
                f"short, lower loader.threads, loader.workers or loader.window; with "
                f"loader.workers=0 all happens in the training process, for a debugger to look at"
            )
        _log.warning("%s; starting another", where)
        self._start(worker)

    def _watch(self) -> None:
        """Kill workers that do not move: whoever listens to them replaces them."""
        while not self._closing.wait(_LOOK_S):
            for worker in self._workers:
                judged = worker.num_starts
                why = self._stuck(worker)
                if why is not None:
                    worker.kill(why, judged)

    def _stuck(self, worker: "_Worker") -> str | None:
        pulse = self._ring.pulse(worker.number)
        age_s = pulse.beat_age_s()
        if age_s is None:
            late = worker.age_s() > _START_LIMIT_S
            return f"did not start within {_START_LIMIT_S:g} s" if late else None
        if age_s > self._timeout_s:
            return f"did not move for {age_s:.0f} s"
        for held in pulse.in_hand():
            if held.age_s > self._timeout_s:
                return f"decoded sample {held.number} for {held.age_s:.0f} s"
        return None

    def _fail(self, error: BaseException) -> None:
        with self._news:
            self._failure = self._failure or error
            self._news.notify_all()


class _Worker:
    """One worker's place: who sits there changes when it dies."""

    def __init__(self, number: int, share: Share, step: int) -> None:
        self.number = number
        self.share = share
        self.step = step  # the first that is not finished
        self.deaths = 0  # since that changed
        self.suspects: tuple[int, ...] = ()  # held by those who died, and not yet probed
        self.num_starts = 0
        self._finished: set[int] = set()  # beyond it
        self._socket: socket | None = None
        self._connection: Connection | None = None
        self._started_s = 0.0
        self._hung_up = False
        self._lock = threading.RLock()  # of who sits here and of the line; `close` may interrupt us

    def start(self, ring: Ring, probe_limit_s: float) -> None:
        """Let another begin at the first unfinished step, unless all is over."""
        assignment = Assignment(
            share=self.share,
            layout=ring.layout,
            worker=self.number,
            step=self.step,
            suspects=self.suspects,
            probe_limit_s=probe_limit_s,
        )
        with self._lock:
            if self._hung_up:
                return
            self._drop_connection()
            self._finished.clear()
            self._started_s = time.monotonic()
            ring.pulse(self.number).clear()
            self.num_starts += 1  # last: who sees it sees no trace of a predecessor
            self._socket, theirs = socketpair()
            with theirs:
                self._launch(theirs, assignment, ring)
            connection = Connection(os.dup(self._socket.fileno()))
        with suppress(OSError):  # it has died already: whoever listens will see
            connection.send(assignment)  # without the lock: it waits for the worker to read
        with self._lock:
            self._connection = connection  # now: the assignment comes before all else

    def send(self, limit: int) -> None:
        """Tell it, if it lives; a dead one's successor is told when it starts."""
        with self._lock, suppress(OSError):
            if self._connection is not None:
                self._connection.send(limit)

    def receive(self) -> object:
        """Its next message. Raises EOFError or OSError when it is gone."""
        if self._connection is None:
            raise EOFError
        return self._connection.recv()

    def finish(self, step: int) -> None:
        """Note that a step is done."""
        self._finished.add(step)
        while self.step in self._finished:
            self._finished.remove(self.step)
            self.step += 1
            self.deaths = 0

    def age_s(self) -> float:
        return time.monotonic() - self._started_s

    def hang_up(self) -> None:
        """Let it end, and nobody follow it. Who waits in `receive` gets an EOFError."""
        with self._lock:
            self._hung_up = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(SHUT_RDWR)

    def bury(self) -> str:
        """Wait for the end of one that is gone; what became of it."""
        self.deaths += 1
        return self._wait()

    def end(self) -> None:
        """Wait until it is gone, and drop what belonged to it."""
        self._wait()
        with self._lock:
            self._drop_connection()

    def kill(self, why: str, judged: int) -> None:
        """End it at once, where that can be done, if it is the one that started as `judged`th."""

    def _drop_connection(self) -> None:
        for end in (self._connection, self._socket):
            if end is not None:
                end.close()
        self._connection = self._socket = None

    def _launch(self, theirs: socket, assignment: Assignment, ring: Ring) -> None:
        raise NotImplementedError

    def _wait(self) -> str:
        raise NotImplementedError


class _ProcessWorker(_Worker):
    """A worker that is a process."""

    _process: subprocess.Popen[bytes] | None = None
    _why_killed = ""

    def kill(self, why: str, judged: int) -> None:
        with self._lock:
            if self.num_starts != judged or self._process is None:
                return
            if self._process.poll() is None:
                self._why_killed = why
                self._process.kill()

    def _launch(self, theirs: socket, assignment: Assignment, ring: Ring) -> None:
        self._why_killed = ""
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "pipeline.worker"),  # -P: not what lies in our folder
                *(str(theirs.fileno()), str(ring.fd)),
            ],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), ring.fd),
        )

    def _wait(self) -> str:
        if self._process is None:
            return "never started"
        try:
            code = self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if self._why_killed:
            return f"{self._why_killed} and was killed"
        return f"was killed by {_name(-code)}" if code < 0 else f"ended with exit code {code}"


class _ThreadWorker(_Worker):
    """A worker that is a thread of this process, with everything else as in one of its own."""

    _thread: threading.Thread | None = None

    def _launch(self, theirs: socket, assignment: Assignment, ring: Ring) -> None:
        def run(connection: Connection) -> None:
            with connection:
                assignment = receive(connection)
                if assignment is not None:
                    serve(connection, assignment, ring)

        connection = Connection(theirs.detach())
        self._thread = threading.Thread(target=run, args=(connection,), name="worker", daemon=True)
        self._thread.start()

    def _wait(self) -> str:
        if self._thread is not None:
            self._thread.join()
        return "ended"


def _environment() -> dict[str, str]:
    """Ours; our packages can be imported from anywhere, libraries are modest."""
    folders = [folder or str(Path.cwd()) for folder in sys.path]
    threads = dict.fromkeys(_ONE_THREAD, "1")
    path = {"PYTHONPATH": os.pathsep.join(folders)}
    return READER_ENVIRONMENT | os.environ | threads | path


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _names(share: Share) -> str:
    return ", ".join(each.url for each in share.data_sets)
