"""A trace of a few steps, to be opened in Perfetto or chrome://tracing.

Switched on by `train.profile_step`; the loop calls `step` after each of its steps. Every rank
writes its own file beside the logs: what waits for whom is seen only side by side.
"""

import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.distributed import World


class Trace:
    """Traces `num_steps` steps from `first_step` on, and nothing for a negative one.

    The run may have begun after `first_step`; then it is traced from its first step on.
    """

    def __init__(self, directory: str, first_step: int, num_steps: int, world: World) -> None:
        self._path = Path(directory) / f"trace-rank{world.rank:05d}.json.gz"
        self._first_step = first_step
        self._steps_left = num_steps if first_step >= 0 else 0
        self._device = world.device
        self._profile: profile | None = None

    def step(self, next_step: int) -> None:
        """To be called before each step with its number."""
        if self._profile is not None:
            self._steps_left -= 1
            if not self._steps_left:
                self._finish()
        elif self._steps_left and next_step >= self._first_step:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._profile is not None:  # the run ended first
            self._finish()

    def _finish(self) -> None:
        assert self._profile is not None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile, self._steps_left = None, 0
        print(f"wrote {self._path}", file=sys.stderr, flush=True)  # noqa: T201 - a run's log
