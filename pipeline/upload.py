"""Blocks of crops on their way to a CUDA device, beside what it computes.

Called by pipeline.loader. The ring's memory is registered with the driver, page-locked, so a copy
out of it needs neither a second copy on the host nor anybody's waiting: it runs on a stream of its
own, and only the kernels that use the crops wait for it. Where registering fails copies are slower
and the host waits for them; that is said once.
"""

import logging
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.telemetry import Telemetry

_log = logging.getLogger(__name__)


class Upload:
    """A batch's blocks on the device: uint8 [count * B, 3, s, s], channels last, crop-major."""

    def __init__(self, crops: list[Tensor], begun: torch.cuda.Event, ended: torch.cuda.Event):
        self.crops = crops
        self._begun = begun
        self._ended = ended

    def is_over(self) -> bool:
        """Whether the host's memory is free again. Never waits."""
        return bool(self._ended.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Let the host wait until its memory is free again."""
        self._ended.synchronize()

    def seconds(self) -> float:
        """How long the copy took on the device, once it is over."""
        return float(self._begun.elapsed_time(self._ended)) / 1e3

    def use(self) -> list[Tensor]:
        """The crops, for the current stream, which waits for them; the host does not."""
        computing = torch.cuda.current_stream(self.crops[0].device)
        computing.wait_event(self._ended)
        for crops in self.crops:
            crops.record_stream(computing)
        return self.crops


class Uploader:
    """Copies batches out of a ring, one after the other.

    Args:
        memory: what is copied from: uint8, page-aligned; it must stay mapped until `close`.
        telemetry: gets `transfer_s`, read from the device's clock after the fact.
    """

    def __init__(
        self, device: torch.device, memory: NDArray[np.uint8], telemetry: Telemetry
    ) -> None:
        self._device = device
        self._telemetry = telemetry
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._busy: deque[Upload] = deque()
        self._memory = memory  # keeps it mapped
        self._pid = os.getpid()
        self._registered = self._register(memory.nbytes)

    def upload(self, blocks: Sequence[NDArray[np.uint8]]) -> Upload:
        """Begin to copy a batch's blocks, uint8 [count, B, s, s, 3]."""
        start = perf_counter()
        with torch.cuda.stream(self._stream):
            begun, ended = _event(), _event()
            begun.record()
            crops = [self._copy(block) for block in blocks]
            ended.record()
        uploaded = Upload(crops, begun, ended)
        self._busy.append(uploaded)
        if not self._registered:
            uploaded.wait()
        if self._telemetry.record_spans:
            self._telemetry.record("upload_s", start, perf_counter())
        return uploaded

    def num_busy(self, *, at_most: int | None = None) -> int:
        """How many of the last uploads still read the host's memory; waits until few enough do."""
        while self._busy:
            oldest = self._busy[0]
            if not oldest.is_over():
                if at_most is None or len(self._busy) <= at_most:
                    break
                oldest.wait()
            self._telemetry.add(transfer_s=oldest.seconds())
            self._busy.popleft()
        return len(self._busy)

    def close(self) -> None:
        """Wait for all copies and give the memory back to the driver; more than once is no error.

        In a process that was forked off it does nothing: the device is not that one's.
        """
        if os.getpid() != self._pid:
            return
        try:
            self.num_busy(at_most=0)
        finally:
            if self._registered:
                self._registered = False
                _cudart().cudaHostUnregister(self._address)

    @property
    def _address(self) -> int:
        return int(self._memory.__array_interface__["data"][0])

    def _copy(self, block: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(block).flatten(0, 1)
        return pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)

    def _register(self, size_bytes: int) -> bool:
        """Lock the memory's pages for the device."""
        with torch.cuda.device(self._device):
            error = _cudart().cudaHostRegister(self._address, size_bytes, 0)
        if int(error) == 0:
            return True
        with suppress(RuntimeError):  # the next kernel would be blamed for it
            torch.zeros(1, device=self._device)
        _log.warning(
            "CUDA cannot lock the loader's %d MiB of shared memory (cudaHostRegister: error %d, "
            "%s): copies to the device are slower, and the training loop waits for them",
            size_bytes >> 20,
            int(error),
            _cudart().cudaGetErrorString(error),
        )
        return False


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
