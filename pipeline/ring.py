"""The memory a rank's training process and its loader workers share: blocks of crops, and a pulse.

A ring has a few slots; a slot holds one batch, a uint8 block for every resolution. Workers write
their rows into it and the loader reads them where they lie, so pixels are never sent. Beside the
slots every worker has a line that shows whether it lives and which samples its threads hold, for
pipeline.workers to read when it does not.

The memory has no name: it is a memfd that workers inherit (elsewhere than on Linux a temporary
file, unlinked at once), so it goes with the last process that maps it, however that one ends.
"""

import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError

UInt8 = NDArray[np.uint8]

_PAGE_BYTES = mmap.PAGESIZE
INTERPRETER, FETCH_LOOP = range(2)  # parts of a worker that can get stuck, each with its beat
_NUM_BEATS = 2
_NOTHING = -1  # in place of a sample's number
_CELL_BYTES = np.dtype(np.int64).itemsize


@dataclass(frozen=True, kw_only=True)
class RingLayout:
    """What lies where: the same for all who map a ring.

    shapes: of a batch's uint8 blocks, one a resolution: (count, B, s, s, 3). num_workers, threads:
    who has a pulse, and of how many decoding threads at most.
    """

    shapes: tuple[tuple[int, ...], ...]
    num_slots: int
    num_workers: int
    threads: int

    @property
    def slot_bytes(self) -> int:
        return _whole_pages(sum(map(prod, self.shapes)))

    @property
    def pulses_bytes(self) -> int:
        return _whole_pages(self.num_workers * self.pulse_cells * _CELL_BYTES)

    @property
    def pulse_cells(self) -> int:
        """A worker's heartbeats, then two cells for each of its decoding threads."""
        return _NUM_BEATS + 2 * self.threads

    @property
    def size_bytes(self) -> int:
        return self.pulses_bytes + self.num_slots * self.slot_bytes


class Ring:
    """A mapped ring: `Ring.create` in the training process, `Ring(layout, fd)` in a worker."""

    def __init__(self, layout: RingLayout, fd: int) -> None:
        self.layout = layout
        self.fd = fd
        # Arrays keep the mapping alive, and the last of them unmaps it: a batch that somebody
        # still looks at outlives the ring.
        self._memory = np.frombuffer(mmap.mmap(fd, layout.size_bytes), dtype=np.uint8)

    @classmethod
    def create(cls, layout: RingLayout) -> Self:
        """Allocate a ring of zeros, all of it. Raises UsageError where there is no room for it."""
        fd = _anonymous_file()
        try:
            _allocate(fd, layout.size_bytes)
            return cls(layout, fd)
        except OSError as error:
            os.close(fd)
            raise UsageError(
                f"no room for {layout.size_bytes / 2**20:.0f} MiB that the loader shares with its "
                f"workers, {layout.num_slots} batches of {layout.slot_bytes / 2**20:.0f} MiB "
                f"({error.strerror}): lower loader.prefetch_batches or loader.global_batch"
            ) from error

    @property
    def slots(self) -> UInt8:
        """All slots as bytes, page-aligned: what a device registers for its copies."""
        return self._memory[self.layout.pulses_bytes :]

    def blocks(self, slot: int) -> list[UInt8]:
        """Views of a slot's blocks, uint8 [count, B, s, s, 3], one a resolution."""
        start = slot * self.layout.slot_bytes
        blocks = []
        for shape in self.layout.shapes:
            size = prod(shape)
            blocks.append(self.slots[start : start + size].reshape(shape))
            start += size
        return blocks

    def pulse(self, worker: int) -> "Pulse":
        """A worker's line."""
        start = worker * self.layout.pulse_cells * _CELL_BYTES
        stop = start + self.layout.pulse_cells * _CELL_BYTES
        return Pulse(self._memory[start:stop].view(np.int64))

    def close(self) -> None:
        """Let go of the memory, once; arrays that were handed out stay valid."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._memory = np.empty(0, np.uint8)


class InHand(NamedTuple):
    """A sample that a thread decodes, by global number, and for how long it has."""

    number: int
    age_s: float


class Pulse:
    """A worker's line: when it was last alive, and what its threads hold. One process writes.

    Times are of time.monotonic_ns, which is one clock for all processes of a machine.
    """

    def __init__(self, cells: NDArray[np.int64]) -> None:
        self._beats = cells[:_NUM_BEATS]
        self._numbers = cells[_NUM_BEATS::2]
        self._since = cells[_NUM_BEATS + 1 :: 2]

    def clear(self) -> None:
        """No life yet, empty hands."""
        self._beats[:] = 0
        self._numbers[:] = _NOTHING

    def beat(self, part: int) -> None:
        """Show that a part of the worker runs: INTERPRETER or FETCH_LOOP."""
        self._beats[part] = time.monotonic_ns()

    @contextmanager
    def holding(self, thread: int, number: int) -> Iterator[None]:
        """While this block runs, a thread has the sample of this global number in its hands."""
        self._since[thread] = time.monotonic_ns()  # first, so that no number has an old time
        self._numbers[thread] = number
        try:
            yield
        finally:
            self._numbers[thread] = _NOTHING

    def beat_age_s(self) -> float | None:
        """Seconds since all parts have beaten; None before each has."""
        beat = int(self._beats.min())
        return _age_s(beat) if beat else None

    def in_hand(self) -> list[InHand]:
        """What the threads hold now, or held when the process died."""
        held = zip(self._numbers.tolist(), self._since.tolist(), strict=True)
        return [InHand(number, _age_s(since)) for number, since in held if number != _NOTHING]


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("cropstream-ring", os.MFD_CLOEXEC)
    fd, path = tempfile.mkstemp(prefix="cropstream-ring-")
    Path(path).unlink()
    return fd


def _allocate(fd: int, size_bytes: int) -> None:
    """Now: memory that is missing later, when a page is first touched, is a SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size_bytes)
    else:
        os.ftruncate(fd, size_bytes)


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES


def _age_s(then_ns: int) -> float:
    return (time.monotonic_ns() - then_ns) / 1e9
