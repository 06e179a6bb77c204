"""A loader worker: fills its rows of one batch after the other until nobody wants them any more.

`python -m pipeline.worker`, started by pipeline.workers with one end of a socket pair and the
ring's memory among its file descriptors; with `loader.workers=0` the same `serve` runs in a thread
of the training process. It is told its share and from which step on, and then, again and again, up
to which step slots are free; it answers with one message a batch (pipeline.messages). Pixels are
not sent: they lie in the ring.

A process of its own, started afresh: a forked child of a process that has used a store's client or
CUDA hangs sooner or later, and threads would share the interpreter lock with the training loop,
whose Python is what a fast device waits for. It never imports torch, so it starts in half a second
and is small. It ends when the other end of its socket is closed, which the kernel does even for a
training process that was killed; it leaves nothing behind.
"""

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from pipeline.batches import BatchFiller, Filled
from pipeline.errors import CropstreamError
from pipeline.messages import Assignment, Condemned, Done, Failed
from pipeline.probe import Trial, probe
from pipeline.ranges import fetch_loop
from pipeline.ring import FETCH_LOOP, INTERPRETER, Pulse, Ring
from pipeline.samples import BadSample
from pipeline.telemetry import Telemetry

_BEAT_S = 0.25


def serve(connection: Connection, assignment: Assignment, ring: Ring) -> None:
    """Fill batches as slots become free, until the other end of the connection is closed.

    Whatever goes wrong is sent there, to be raised in the training process.
    """
    try:
        _serve(connection, assignment, ring)
    except BaseException as error:  # noqa: BLE001 - the edge of the process
        _tell(connection, Failed(_portable(error)))


def receive(connection: Connection) -> Any:
    """The next message; None when the other end is closed."""
    try:
        return connection.recv()
    except (EOFError, ConnectionError):
        return None


def _tell(connection: Connection, message: Condemned | Done | Failed) -> None:
    with suppress(OSError):  # nobody listens any more: whoever receives ends us
        connection.send(message)


def _serve(connection: Connection, assignment: Assignment, ring: Ring) -> None:
    share, pulse = assignment.share, ring.pulse(assignment.worker)
    telemetry = Telemetry(record_spans=share.record_spans)
    with BatchFiller(share, pulse, telemetry) as filler:
        if assignment.suspects:
            condemned = _probe(filler, assignment)
            for bad in condemned:
                filler.condemn(bad)
            _tell(connection, Condemned(condemned))
        filler.start(assignment.step)
        batches = _Batches(connection, filler, telemetry)
        begun = assignment.step
        while (limit := receive(connection)) is not None:
            for step in range(begun, limit):
                batches.begin(step, ring)
            begun = max(begun, limit)


def main() -> None:
    """The worker process. Its arguments are the descriptors of its socket and of the ring."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the training process, which ends us
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    assignment = receive(connection)
    if assignment is not None:
        ring = Ring(assignment.layout, int(sys.argv[2]))
        pulse = ring.pulse(assignment.worker)
        threading.Thread(target=_beat, args=(pulse, os.getppid()), daemon=True).start()
        fetch_loop().call_soon_threadsafe(_beat_on_loop, pulse)
        serve(connection, assignment, ring)
    os._exit(0)  # whatever our threads still do is of no use to anybody


@dataclass
class _Batch:
    """A batch in the making."""

    step: int
    left: int  # jobs
    parts: list[Filled] = field(default_factory=list)


class _Batches:
    """Hands out the jobs of batches and tells when one is complete."""

    def __init__(self, connection: Connection, filler: BatchFiller, telemetry: Telemetry) -> None:
        self._connection = connection
        self._filler = filler
        self._telemetry = telemetry
        self._lock = threading.Lock()

    def begin(self, step: int, ring: Ring) -> None:
        jobs = self._filler.submit(step, ring.blocks(step % ring.layout.num_slots))
        batch = _Batch(step, len(jobs))
        for job in jobs:
            job.add_done_callback(partial(self._finish, batch))

    def _finish(self, batch: _Batch, job: Future[Filled]) -> None:
        if job.cancelled():
            return
        with self._lock:
            try:
                batch.parts.append(job.result())
                batch.left -= 1
                if not batch.left:
                    _tell(self._connection, self._report(batch))
            except BaseException as error:  # noqa: BLE001 - the edge of a thread
                _tell(self._connection, Failed(_portable(error)))

    def _report(self, batch: _Batch) -> Done:
        replaced = [each for part in batch.parts for each in part.replaced]
        return Done(
            batch.step,
            sorted(replaced, key=lambda each: each.bad.number),
            max(part.arrived_s for part in batch.parts),
            max(part.done_s for part in batch.parts),
            self._telemetry.take(),
            self._telemetry.take_spans(),
        )


def _probe(filler: BatchFiller, assignment: Assignment) -> list[BadSample]:
    """Try each suspect in a child process; in turn, so that nothing of ours slows it down."""
    share, num_slots = assignment.share, assignment.layout.num_slots

    def judge(number: int) -> BadSample | None:
        sample = filler.read(number)
        if isinstance(sample, BadSample):
            return None  # as its turn will show
        trial = Trial(
            max_pixels=share.max_image_pixels,
            crops=share.crops,
            seed=share.seed,
            epoch=filler.epoch_of(number, range(assignment.step, assignment.step + num_slots)),
            sample=number,
        )
        reason = probe(sample.data, trial, limit_s=assignment.probe_limit_s)
        return BadSample(number, sample.key, sample.shard, reason) if reason else None

    return [bad for bad in map(judge, assignment.suspects) if bad is not None]


def _beat(pulse: Pulse, parent: int) -> None:
    """Show that the interpreter runs; end when an orphan, should the socket not tell."""
    while os.getppid() == parent:
        pulse.beat(INTERPRETER)
        time.sleep(_BEAT_S)
    os._exit(0)


def _beat_on_loop(pulse: Pulse) -> None:
    """Show that reading goes on, or could: to be called on the fetch loop."""
    pulse.beat(FETCH_LOOP)
    fetch_loop().call_later(_BEAT_S, _beat_on_loop, pulse)


def _portable(error: BaseException) -> BaseException:
    """The error as it can be sent; one that is not ours with where it happened."""
    text = "".join(traceback.format_exception(error))
    if not isinstance(error, CropstreamError):
        error.add_note(f"In a loader worker:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except (TypeError, AttributeError, pickle.PicklingError):
        return RuntimeError(f"in a loader worker:\n{text}")
    return error


if __name__ == "__main__":
    main()
