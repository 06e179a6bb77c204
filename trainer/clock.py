"""Rates between logged steps, where their time went, and what this process has used."""

import resource
import time
from typing import TYPE_CHECKING, Any

import torch

from pipeline.loader import MultiCropLoader
from pipeline.streaming import StreamingLoader
from trainer.distributed import World
from trainer.flops import flops_per_image, mfu, peak_of

if TYPE_CHECKING:
    from trainer.config import Config

Loader = MultiCropLoader | StreamingLoader

# Where a step's time went, of what the loader counts: told also when it is nothing.
_WAITS = ("data_wait_s", "wait_fetch_s", "wait_decode_s", "wait_handover_s", "transfer_s")


class Clock:
    """Counts steps and seconds of a run on one rank; `step` is the first that is not yet told."""

    def __init__(self, config: "Config", world: World, loader: Loader) -> None:
        self._world = world
        self._loader = loader
        self._flops_per_image = flops_per_image(config)
        self._peak_tflops = peak_of(
            world.device, config.engine.precision, override=config.train.peak_tflops
        )
        self.start(0)

    def start(self, step: int) -> None:
        """Begin to count; the next step is `step`."""
        self.step, self._time = step, time.perf_counter()

    def lap(self, step: int) -> dict[str, Any]:
        """Figures of the steps since the last lap, the next being `step` now.

        `mfu` is left out where no peak is known: `train.peak_tflops` tells it.
        """
        now = time.perf_counter()
        steps = step - self.step
        seconds = (now - self._time) / steps
        sums = self._loader.telemetry.take()
        self.step, self._time = step, now
        images_per_s = self._loader.batch_size * self._world.world_size / seconds
        return {
            "images_per_s": images_per_s,
            "step_s": seconds,
            **self._utilisation(images_per_s),
            **{name: sums.pop(name, 0.0) / steps for name in _WAITS},
            **{f"loader/{name}": amount / steps for name, amount in sorted(sums.items())},
            "world_size": self._world.world_size,
            **self._memory(),
            "time": time.time(),
        }

    def _utilisation(self, images_per_s: float) -> dict[str, float]:
        num_devices = self._world.world_size
        share = mfu(images_per_s, self._flops_per_image, num_devices, self._peak_tflops)
        tflops = images_per_s * self._flops_per_image / num_devices / 1e12
        return {"tflops_per_device": tflops} | ({} if share is None else {"mfu": share})

    def _memory(self) -> dict[str, int]:
        found = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if self._world.device.type == "cuda":
            found["peak_device_bytes"] = torch.cuda.max_memory_allocated(self._world.device)
        return found
