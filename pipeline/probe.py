"""Would this image kill its decoder? Asked in a process of its own, which may die of the answer.

`python -m pipeline.probe` does with the image on its standard input what a worker did with it:
decode it, whole and at the scale that its crops allow (two ways through libjpeg), cut these crops,
and end. A worker that takes the place of a dead one asks so about every sample that was in the dead
one's hands (pipeline.worker), one after the other. What crashes the probe, too, or takes more CPU
time than there is for an image, is a bad sample. Whether it decodes to anything is not asked: an
orderly refusal harms nobody.

To condemn a sample changes the batches, so only what the image alone can have caused counts. Any
other end says as much about the machine (SIGKILL is what the kernel sends when memory is short, and
wall time passes quickly on a busy machine): the probe is repeated once, and then the image passes.
"""

import ctypes
import json
import logging
import math
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline import resize
from pipeline.crops import CropsConfig, block_shapes, crop_boxes, decode_crops
from pipeline.decode import guard_header
from pipeline.errors import SampleError

DIED, HUNG = "decoder died", "decoder hung"
READY = b"+"

_log = logging.getLogger(__name__)

_CRASHES = frozenset(
    (
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE),
        *(signal.SIGABRT, signal.SIGTRAP),
    )
)
_START_LIMIT_S = 120.0  # to import what it needs, on a slow file system too
_WALL_TIMES = 4  # the limit of CPU time: so long may it take on a busy machine
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is tried with an image: the cap of its guard, and all that its crops depend on."""

    max_pixels: int
    crops: CropsConfig
    seed: int
    epoch: int
    sample: int

    def run(self, data: bytes) -> None:
        """Decode and cut. Raises SampleError for what cannot be used."""
        header = guard_header(data, max_pixels=self.max_pixels)
        boxes = crop_boxes(
            self.crops,
            seed=self.seed,
            epoch=self.epoch,
            sample=self.sample,
            width_px=header.width_px,
            height_px=header.height_px,
        )
        out = [np.empty(shape, np.uint8)[:, 0] for shape in block_shapes(self.crops, 1)]
        for reduced in {False, self.crops.reduced_decode}:
            decode_crops(data, header, boxes, out, reduced=reduced)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Trial":
        fields = json.loads(text)
        crops: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.pop("crops").items()
        }
        return cls(crops=CropsConfig(**crops), **fields)


def probe(data: bytes, trial: Trial, *, limit_s: float) -> str | None:
    """Try it with an image in a child process. Returns why not to do it here, or None.

    The limit is of CPU time. Call it from a thread that lives on: the child ends with it.
    """
    arguments = [str(os.getpid()), str(limit_s), trial.to_json()]
    return run_probe([sys.executable, "-P", "-m", __name__, *arguments], data, limit_s)


def run_probe(command: list[str], data: bytes, limit_s: float) -> str | None:
    """What a command shows of `data` by how it ends: DIED or HUNG and how, or None.

    The command confines itself, writes a byte when it is ready, and reads.
    """
    for _ in range(2):
        code = _run(command, data, limit_s)
        if code == 0:
            return None
        if -code in _CRASHES:
            return f"{DIED}: {signal.Signals(-code).name}"
        if -code == signal.SIGXCPU:
            return f"{HUNG}: no end within {limit_s:g} s of CPU time"
    _log.warning("the probe of an image ended with exit code %d, twice: it is not judged", code)
    return None


def confine(parent: int, limit_s: float) -> None:
    """Let this process end with its parent, by signals, and after so much more of CPU time."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):  # a worker ignores the first two
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)
    end_s = math.ceil(time.process_time() + limit_s)
    _, most_s = resource.getrlimit(resource.RLIMIT_CPU)
    if most_s == resource.RLIM_INFINITY or end_s < most_s:
        resource.setrlimit(resource.RLIMIT_CPU, (end_s, most_s))


def _run(command: list[str], data: bytes, limit_s: float) -> int:
    """The exit code of a probe; that of SIGKILL for one that took too much wall time."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        try:
            _wait_until_ready(child)
            child.communicate(data, _WALL_TIMES * limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            child.kill()
    return child.returncode


def _wait_until_ready(child: "subprocess.Popen[bytes]") -> None:
    """Until its first byte, or its end. Raises subprocess.TimeoutExpired."""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        if not selector.select(_START_LIMIT_S):
            raise subprocess.TimeoutExpired(child.args, _START_LIMIT_S)
    child.stdout.read(1)


def main() -> None:
    """Try what the last argument says with standard input. The others: of `confine`."""
    parent, limit_s, trial = sys.argv[1:]
    resize.warm_up()
    confine(int(parent), float(limit_s))
    os.write(sys.stdout.fileno(), READY)
    data = sys.stdin.buffer.read()
    with suppress(SampleError):
        Trial.from_json(trial).run(data)


if __name__ == "__main__":
    main()
