"""A run between its steps: who takes part, the next batch, what is reported and what is kept.

Called by the loop (trainer.train), on every rank at the same point. Before every step the ranks
agree on whether there is one: one of them may have been told to stop, may have no batch because its
store is out of reach, or all of them together have met too many bad samples. So nobody begins a
step that another does not join, and whatever ends a run, except a loss or a weight that is not
finite, what it has trained by then is saved first.

The host waits for the device only at logged and saved steps. There all losses since the last one
are looked at, so a loss that is not finite is told with its own step and images.
"""

import logging
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Never, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import dump_config
from pipeline.errors import CropstreamError, DataError, TrainingError
from pipeline.loader import Batch
from pipeline.quarantine import Entry, in_order
from trainer.checkpoint import Checkpoints
from trainer.clock import Clock, Loader
from trainer.distributed import World, together
from trainer.engine import Engine
from trainer.fragments import Checkpoint
from trainer.health import DriftProbe, Health, Observed
from trainer.metrics import MetricsLog
from trainer.models.batchnorm import average_statistics, paused_statistics
from trainer.queue import FeatureQueue
from trainer.watch import Watch

if TYPE_CHECKING:
    from trainer.config import Config

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A step whose work was handed to the device; its loss may still be on its way.

    samples: int64 [B], of this rank. figures: for the log, beside the loss. Some of these are kept
    until their loss is read, so nothing here is large.
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
    _newest: Trained | None = None
    _observed: Observed | None = None  # of the newest step, if it is one to be logged
    _loss: float = math.nan  # the newest that was read
    _unread: list[Trained] = field(default_factory=list)  # steps whose loss nobody has read
    _position: dict[str, Any] = field(default_factory=dict)  # of the data, behind that step

    def __post_init__(self) -> None:
        self._clock = Clock(self.config, self.world, self.loader)
        self._health = Health()
        self._watch = Watch(self.config.health, num_prototypes=self.config.model.num_prototypes)
        self._drift = _drift_probe(self.config, self.queue)

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
        if self.engine.loss_scale is not None and "loss_scale" in state:
            self.engine.loss_scale.load(state["loss_scale"])
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

    def note(self, trained: Trained, images: Tensor, observed: Observed | None) -> None:
        """Take note of a step; log it and save the run if it is time to.

        images: one global crop of each of its samples, [B, 3, s, s]. observed: of a step that
        `is_logged`.
        """
        self._newest, self._observed = trained, observed
        self._unread.append(trained)
        if self._drift is not None:  # before the queue is used, too: it tells when that would do
            self._drift.visit(trained.step, images, self._encode)
        self._position = self.loader.state_dict()
        self.num_steps = trained.step + 1
        self._keep(
            logging=self.is_logged(trained.step),
            saving=self.num_steps % self.config.checkpoint.every_steps == 0,
        )

    def is_logged(self, step: int) -> bool:
        """Whether the log tells of a step: one in so many, and the last of the run."""
        number = step + 1
        return number % self.config.train.log_every_steps == 0 or number == self.total_steps

    def finish(self) -> None:
        """Log and save the newest step, unless that was done."""
        self._keep(
            logging=self.num_steps > self._clock.step,
            saving=self.num_steps > self._saved_step,
        )

    def _keep(self, *, logging: bool, saving: bool) -> None:
        if self._newest is None or not (logging or saving):
            return
        self._read_losses()  # a checkpoint of what has diverged is none
        if logging:
            self._report(self._newest)
        if saving:
            self._save()

    def _report(self, trained: Trained) -> None:
        record: dict[str, Any] = {"step": trained.step, "epoch": trained.epoch}
        record |= {"loss": self._loss, **trained.figures}
        record |= self._checked()
        record |= self._clock.lap(self.num_steps)
        if not self.log:
            return
        if alarms := self._watch.judge(record):
            record["alarms"] = [str(alarm) for alarm in alarms]
        self.log.write(record)

    def _checked(self) -> dict[str, float]:
        """The health of a step, the same on all ranks; the host waits once for all figures."""
        if self._observed is None:  # the run was stopped between two logged steps
            return {}
        figures = self._health.measure(
            self._observed, prototypes_KD=self.engine.prototypes(), group=dist.group.WORLD
        )
        if self._drift is not None:
            figures |= self._drift.figures()
        optimizer = self.engine.optimizer
        figures |= {f"health/{name}": value for name, value in optimizer.ranges().items()}
        if optimizer.loss_scale is not None:
            figures["loss_scale"] = optimizer.loss_scale
        device = self.world.device
        values = torch.stack([value.double().to(device) for value in figures.values()]).tolist()
        return dict(zip(figures, values, strict=True))

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        """Features of images as the model gives them now, without a trace in it. Collective."""
        with paused_statistics(self.engine.module):
            features, _ = self.engine.forward([images])
        return features

    def _save(self) -> None:
        state: dict[str, Any] = {
            "loader": self._position,
            "quarantine": self._gather_quarantine(self._position),
            "config": dump_config(self.config),
        }
        if self.engine.loss_scale is not None:
            state["loss_scale"] = self.engine.loss_scale.state()
        if self.config.model.batchnorm_ranks:  # else all ranks have the same statistics
            average_statistics(self.engine.module)
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

    def _read_losses(self) -> None:
        """Read the losses of the steps since the last reading: the host waits for the device.

        Raises TrainingError on every rank when one is not finite on one, naming the first such step
        and its samples.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        losses = torch.stack([trained.loss for trained in unread]).tolist()
        bad = [n for n, loss in enumerate(losses) if not math.isfinite(loss)]
        self._loss = self.world.mean([losses[-1]]).item()
        [num_bad] = self.world.sum(len(bad))
        if num_bad:
            first = _Bad.of(self.world, unread[bad[0]], losses[bad[0]]) if bad else None
            self._fail_of_losses(first)

    def _fail_of_losses(self, mine: "_Bad | None") -> Never:
        found = sorted(each for each in self.world.gather(mine) if each is not None)
        first, url = found[0], self.config.checkpoint.run
        raise TrainingError(
            f"the loss is not finite at step {first.step} of epoch {first.epoch}: {first.loss} on "
            f"rank {first.rank}, samples {list(first.samples)}… ({len(found)} rank(s) in all). Go "
            f"on from an older checkpoint with a lower schedule.base_lr or engine.precision=fp32: "
            f"`python -m trainer.checkpoint ls {url}` lists them, `python -m trainer.checkpoint rm "
            f"{url} --step N` removes a newer one"
        )


@dataclass(frozen=True, order=True)
class _Bad:
    """A step on one rank whose loss is not finite."""

    step: int
    rank: int
    epoch: int
    loss: str
    samples: tuple[int, ...]

    @classmethod
    def of(cls, world: World, trained: Trained, loss: float) -> Self:
        samples = tuple(trained.samples[:8].tolist())
        return cls(trained.step, world.rank, trained.epoch, str(loss), samples)


def _drift_probe(config: "Config", queue: FeatureQueue | None) -> DriftProbe | None:
    """Looks after the queue, if there is one."""
    if queue is None or not queue.length:
        return None
    return DriftProbe(
        queue.length // config.loader.global_batch,
        every_steps=config.train.log_every_steps,
        group=dist.group.WORLD,
    )


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
