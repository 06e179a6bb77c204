"""Would this image kill its decoder? Asked in a process of its own, which may die of the answer.

`python -m pipeline.probe` does with the image on its standard input what a worker did with it:
decode it, whole and at the scale that its crops allow (two ways through libjpeg), cut these crops,
and end. A worker that takes the place of a dead one asks so about every sample that was in the dead
one's hands (pipeline.worker); what kills or hangs the probe, too, is a bad sample. Whether it
decodes to anything is not asked: an orderly refusal harms nobody.
"""

import json
import os
import subprocess
import sys
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
    """Try it with an image in a child process. Returns why not to do it here, or None."""
    return run_probe([sys.executable, "-P", "-m", __name__, trial.to_json()], data, limit_s)


def run_probe(command: list[str], data: bytes, limit_s: float) -> str | None:
    """What a command shows of `data` by how it ends: DIED or HUNG and how, or None.

    The command writes a byte when it is ready to read: the limit is for what follows.
    """
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        try:
            child.communicate(data, limit_s)
        except subprocess.TimeoutExpired:
            child.kill()
            return f"{HUNG}: no end within {limit_s:g} s"
    if child.returncode < 0:
        return f"{DIED}: signal {-child.returncode}"
    return f"{DIED}: exit code {child.returncode}" if child.returncode else None


def main() -> None:
    """Try what `sys.argv[1]` says with standard input."""
    trial = Trial.from_json(sys.argv[1])
    resize.warm_up()
    os.write(sys.stdout.fileno(), READY)
    data = sys.stdin.buffer.read()
    with suppress(SampleError):
        trial.run(data)


if __name__ == "__main__":
    main()
