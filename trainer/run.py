"""A run between its steps: who takes part, the next batch, what is reported and what is kept.

Called by the loop (trainer.train), on every rank at the same point. Before every step the ranks
agree on whether there is one: one of them may have been told to stop, may have no batch because its
store is out of reach, or all of them together have met too many bad samples. So nobody begins a
step that another does not join, and whatever ends a run, except a loss or a weight that is not
finite, what it has trained by then is saved first.
"""

import logging
import math
import resource
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Never

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import dump_config
from pipeline.errors import CropstreamError, DataError, TrainingError
from pipeline.loader import Batch, MultiCropLoader
from pipeline.quarantine import Entry, in_order
from pipeline.streaming import StreamingLoader
from trainer.checkpoint import Checkpoints
from trainer.distributed import World, together
from trainer.engine import Engine
from trainer.fragments import Checkpoint
from trainer.metrics import MetricsLog
from trainer.queue import FeatureQueue

if TYPE_CHECKING:
    from trainer.config import Config

Loader = MultiCropLoader | StreamingLoader

# Where a step's time went, of what the loader counts: told also when it is nothing.
_WAITS = ("data_wait_s", "wait_fetch_s", "wait_decode_s", "wait_handover_s", "transfer_s")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A step whose work was handed to the device; its loss may still be on its way.

    samples: int64 [B], of this rank. figures: for the log, beside the loss.
    """

    step: int
    epoch: int
    samples: NDArray[np.int64]
    loss: Tensor  # scalar, of this rank
    figures: dict[str, Any]


@dataclass
class Run:
    """A run that is ready for its next step."""

    config: "Config"
    world: World
    checkpoints: Checkpoints
    loader: Loader
    engine: Engine
    queue: FeatureQueue | None
    changes: list[str] = field(default_factory=list)  # of settings, since the checkpoint
    history: bytes = b""  # metrics of before we were started, on rank 0
    log: MetricsLog | None = None  # on rank 0, once training has begun
    num_steps: int = 0  # trained, by earlier runs too
    num_found: int = 0  # bad samples of all ranks, since we were started
    _num_compared: int = 0  # of these, when all quarantines were last looked at
    _saved_step: int = 0  # of the newest checkpoint; 0 before there is one
    _trained: Trained | None = None  # the newest step
    _position: dict[str, Any] = field(default_factory=dict)  # of the data, behind that step

    def __post_init__(self) -> None:
        self._clock = _Clock(self.loader)

    @property
    def total_steps(self) -> int:
        return self.config.train.epochs * self.loader.steps_per_epoch

    @property
    def kept(self) -> str:
        """What is not lost if the run ends now, for a message."""
        step, url = self._saved_step, self.config.checkpoint.run
        if not step:
            return "no checkpoint was written yet"
        return f"the same command goes on from the checkpoint of step {step} in {url}"

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go to a checkpoint."""
        state = self.checkpoints.restore(checkpoint, self.engine, queue=self.queue)
        self.num_steps = self._saved_step = checkpoint.step
        self.changes = changed_settings(state["config"], dump_config(self.config))
        self.history = self.checkpoints.metrics(checkpoint)

    def batches(self, is_stopped: Callable[[], bool]) -> Iterator[Batch]:
        """This rank's batches up to the end of the run, or until one rank was told to stop.

        Hand every step to `note` before asking for the next batch. If some rank can have none, what
        was trained is saved, and the error of the first such rank raised on all (`together`).
        """
        self._clock.start(self.num_steps)
        self._position = self.loader.state_dict()
        batches = iter(self.loader)
        while self.num_steps < self.total_steps:
            batch, failure = _next(batches)
            stopping, failing, self.num_found = self.world.sum(
                (batch is None and failure is None) or is_stopped(),
                failure is not None,
                self.loader.quarantine.num_found,
            )
            failure = self._over_limit() or failure
            if failing or failure:
                self._fail(failure)
            if stopping or batch is None:
                return
            yield batch

    def note(self, trained: Trained) -> None:
        """Take note of a step; log it and save the run if it is time to."""
        self._trained = trained
        self._position = self.loader.state_dict()
        self.num_steps = trained.step + 1
        self._keep(
            logging=self.num_steps % self.config.train.log_every_steps == 0,
            saving=self.num_steps % self.config.checkpoint.every_steps == 0,
        )

    def finish(self) -> None:
        """Log and save the newest step, unless that was done."""
        self._keep(
            logging=self.num_steps > self._clock.step,
            saving=self.num_steps > self._saved_step,
        )

    def _keep(self, *, logging: bool, saving: bool) -> None:
        if self._trained is None or not (logging or saving):
            return
        loss = self._read_loss(self._trained)  # a checkpoint of what has diverged is none
        if logging:
            self._report(self._trained, loss)
        if saving:
            self._save()

    def _report(self, trained: Trained, loss: float) -> None:
        record = {"step": trained.step, "epoch": trained.epoch, "loss": loss, **trained.figures}
        record |= self._clock.lap(self.world, self.num_steps)
        if self.log:
            self.log.write(record)

    def _save(self) -> None:
        state = {
            "loader": self._position,
            "quarantine": self._gather_quarantine(self._position),
            "config": dump_config(self.config),
        }
        metrics = self.log.all_lines() if self.log else b""
        self.checkpoints.save(
            self.num_steps, self.engine, queue=self.queue, state=state, metrics=metrics
        )
        self._saved_step = self.num_steps

    def _gather_quarantine(self, position: Mapping[str, Any]) -> list[Entry]:
        """The bad samples that some rank has met before a position, or an earlier run."""
        found = self.loader.quarantine.before(position["epoch"], position["step"])
        return in_order(each for part in self.world.gather(found) for each in part)

    def _over_limit(self) -> DataError | None:
        """The same on all ranks: that together they have met too many bad samples, if so."""
        quarantine = self.loader.quarantine
        if self.num_found == self._num_compared or not quarantine.may_be_over(self.num_found):
            return None
        self._num_compared = self.num_found
        found = self._gather_quarantine(self.loader.state_dict())
        try:
            quarantine.check(found)
        except DataError as error:
            return error
        return None

    def _fail(self, failure: CropstreamError | None) -> Never:
        """Save what was trained, then end all ranks with the first one's failure, told once."""
        try:
            self.finish()
        except CropstreamError as error:  # on all ranks; the failure says more
            if self.world.is_first:
                _log.warning("the steps since the newest checkpoint are lost: %s", error)
        together(self.world, lambda: _raise(failure))
        raise AssertionError("together raises what any rank raises")

    def _read_loss(self, trained: Trained) -> float:
        """The mean loss over ranks; here the host waits for the device.

        Raises TrainingError on every rank when the loss of one is not finite, naming its samples.
        """
        world, mine = self.world, trained.loss.item()
        loss: float = world.mean([mine]).item()
        if not math.isfinite(loss):
            where = f"{mine} on rank {world.rank}, samples {trained.samples[:8].tolist()}…"
            found = [each for each in world.gather(None if math.isfinite(mine) else where) if each]
            url = self.config.checkpoint.run
            raise TrainingError(
                f"the loss is not finite at step {trained.step} of epoch {trained.epoch}: "
                f"{found[0]} ({len(found)} rank(s) in all). Go on from an older checkpoint with a "
                f"lower schedule.base_lr or engine.precision=fp32: `python -m trainer.checkpoint "
                f"ls {url}` lists them, `python -m trainer.checkpoint rm {url} --step N` removes "
                f"a newer one"
            )
        return loss


class _Clock:
    """Rates between logged steps, and what this process has used."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.start(0)

    def start(self, step: int) -> None:
        """Begin to count; the next step is `step`."""
        self.step, self._time = step, time.perf_counter()

    def lap(self, world: World, step: int) -> dict[str, Any]:
        """Figures of the steps since the last lap, the next being `step` now."""
        now = time.perf_counter()
        steps = step - self.step
        seconds = (now - self._time) / steps
        sums = self._loader.telemetry.take()
        self.step, self._time = step, now
        return {
            "images_per_s": self._loader.batch_size * world.world_size / seconds,
            "step_s": seconds,
            **{name: sums.pop(name, 0.0) / steps for name in _WAITS},
            **{f"loader/{name}": amount / steps for name, amount in sorted(sums.items())},
            "world_size": world.world_size,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "time": time.time(),
        }


def _next(batches: Iterator[Batch]) -> tuple[Batch | None, CropstreamError | None]:
    """The next batch, or none where the loader was stopped, or what kept it from having one."""
    try:
        return next(batches, None), None
    except CropstreamError as error:
        return None, error


def _raise(failure: CropstreamError | None) -> None:
    if failure is not None:
        raise failure


def changed_settings(before: str, now: str) -> list[str]:
    """The differences of two configurations as `dump_config` writes them: "key old -> new"."""
    old, new = _flat(before), _flat(now)
    keys = dict.fromkeys([*new, *old])
    return [
        f"{key} {old.get(key, 'unset')} -> {new.get(key, 'unset')}"
        for key in keys
        if old.get(key) != new.get(key)
    ]


def _flat(text: str) -> dict[str, Any]:
    tree = tomllib.loads(text)
    return {f"{name}.{key}": value for name, part in tree.items() for key, value in part.items()}
