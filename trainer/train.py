"""The loop: data in, a step, figures and checkpoints out. Reads from top to bottom as a run does.

Called by `python -m trainer` and `deepspeed --module trainer`. A run that is started again goes on
from its newest checkpoint and trains on exactly the batches it would have seen.
"""

import math
import os
import resource
import signal
import socket
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt

from pipeline.config import dump_config
from pipeline.errors import CropstreamError, TrainingError, UsageError
from pipeline.loader import Batch, MultiCropLoader
from pipeline.quarantine import Entry, in_order
from pipeline.streaming import StreamingLoader
from pipeline.tars import names_tars
from trainer.checkpoint import Checkpoints
from trainer.distributed import World
from trainer.engine import DeepSpeedEngine, Engine
from trainer.fragments import Checkpoint
from trainer.metrics import MetricsLog
from trainer.models import build_model
from trainer.optim import LARC, parameter_groups
from trainer.queue import FeatureQueue
from trainer.schedule import warmup_cosine
from trainer.step import StepResult, swav_step

if TYPE_CHECKING:  # config.py collects the sections, ours among them
    from trainer.config import Config

T = TypeVar("T")
Loader = MultiCropLoader | StreamingLoader

# Where a step's time went, of what the loader counts: told also when it is nothing.
_WAITS = ("data_wait_s", "wait_fetch_s", "wait_decode_s", "wait_handover_s", "transfer_s")

STOPPED = 3  # exit code: a checkpoint was committed, start me again


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Section `train`: how long, from which seed, and how often to report."""

    epochs: Annotated[int, Gt(0)] = 100
    seed: Annotated[int, Ge(0)] = 31
    log_every_steps: Annotated[int, Gt(0)] = 10
    log_dir: str = "build/runs"  # metrics.jsonl and TensorBoard files of this machine


def train(config: "Config", world: World) -> int:
    """Train from the newest checkpoint, or from the beginning, to the end of the last epoch.

    Returns the exit code: 0 done, 3 stopped by SIGTERM after a committed checkpoint.
    """
    stop = _catch_sigterm()
    run = _prepare(config, world)
    total_steps = config.train.epochs * run.loader.steps_per_epoch
    queue_start = _queue_start(config, run.loader.steps_per_epoch)
    _announce(run, total_steps)

    with run.loader, together(world, lambda: _open_log(run, total_steps)) as log, _kept(run):
        clock = _Clock(run.loader, run.first_step)
        for step, batch in enumerate(run.loader, start=run.first_step):
            queue = run.queue if step >= queue_start else None
            queue_used = queue is not None and queue.is_full
            lr = _learning_rate(config, step, run.loader.steps_per_epoch)
            result = swav_step(
                run.engine,
                batch.crops,
                queue=queue,
                num_crops=config.crops.num_crops,
                crops_for_assign=config.loss.crops_for_assign,
                temperature=config.loss.temperature,
                epsilon=config.sinkhorn.epsilon,
                num_iterations=config.sinkhorn.num_iterations,
                lr=lr,
                freeze_prototypes=step < config.schedule.freeze_prototypes_steps,
                group=dist.group.WORLD,
            )
            stopping, num_found = world.sum(stop.is_set(), run.loader.quarantine.num_found)
            run.check_quarantine(num_found)
            done = step + 1
            ending = stopping or done == total_steps
            logging = done % config.train.log_every_steps == 0 or ending
            saving = done % config.checkpoint.every_steps == 0 or ending
            if logging or saving:  # a checkpoint of a run that has diverged is worse than none
                loss = _read_loss(run, result, batch)
            if logging:
                record = {"step": step, "epoch": batch.epoch, "loss": loss, "lr": lr}
                record |= {"queue_used": queue_used, **clock.lap(world, step)}
                if log:
                    log.write(record)
            if saving:
                run.save(done, log)
            if ending:
                _conclude(run, done, total_steps, num_found)
            if stopping and done < total_steps:
                return STOPPED
    return 0


@dataclass
class _Run:
    """A run that is ready for its next step."""

    config: "Config"
    world: World
    checkpoints: Checkpoints
    loader: Loader
    engine: Engine
    queue: FeatureQueue | None
    num_found: int = 0  # of all ranks, of bad samples, when they were last looked at
    first_step: int = 0
    saved_step: int = 0  # of the newest checkpoint; 0 before there is one
    changes: list[str] = field(default_factory=list)  # of settings, since the checkpoint
    history: bytes = b""  # metrics of before we were started, on rank 0

    def resume(self, checkpoint: Checkpoint) -> None:
        state = self.checkpoints.restore(checkpoint, self.engine, queue=self.queue)
        self.first_step = self.saved_step = checkpoint.step
        self.changes = changed_settings(state["config"], dump_config(self.config))
        self.history = self.checkpoints.metrics(checkpoint)

    def check_quarantine(self, num_found: int) -> None:
        """Raise DataError, told once, when all ranks together have met too many bad samples.

        num_found: sum over ranks. It is the same on all of them, so they look at the same step.
        """
        quarantine = self.loader.quarantine
        if num_found > self.num_found and quarantine.may_be_over(num_found):
            self.num_found = num_found
            found = self.gather_quarantine()
            together(self.world, lambda: quarantine.check(found))

    def gather_quarantine(self) -> list[Entry]:
        """The bad samples that some rank has met by now, or an earlier run."""
        position = self.loader.state_dict()
        found = self.loader.quarantine.before(position["epoch"], position["step"])
        return in_order(each for part in self.world.gather(found) for each in part)

    def save(self, step: int, log: MetricsLog | None) -> None:
        state = {
            "loader": self.loader.state_dict(),
            "quarantine": self.gather_quarantine(),
            "config": dump_config(self.config),
        }
        metrics = log.all_lines() if log else b""
        self.checkpoints.save(step, self.engine, queue=self.queue, state=state, metrics=metrics)
        self.saved_step = step


def _prepare(config: "Config", world: World) -> _Run:
    """Everything a run needs, in the state of its newest checkpoint if there is one."""
    checkpoints = together(world, lambda: Checkpoints(config.checkpoint, world))
    checkpoint = checkpoints.latest()
    loader = together(world, lambda: _build_loader(config, world, checkpoint))
    queue = together(world, lambda: _build_queue(config, world, loader))
    checkpoints.prove_writable()
    engine = _build_engine(config, world)
    run = _Run(config, world, checkpoints, loader, engine, queue)
    if checkpoint is not None:
        run.resume(checkpoint)
    return run


def _open_log(run: _Run, total_steps: int) -> AbstractContextManager[MetricsLog | None]:
    if not run.world.is_first:
        return nullcontext()
    directory = run.config.train.log_dir
    try:
        return MetricsLog(
            directory, history=run.history, first_step=run.first_step, total_steps=total_steps
        )
    except OSError as error:
        raise UsageError(
            f"cannot write logs to train.log_dir={directory}: {error.strerror or error}; "
            f"give it a folder of this machine that can be written to"
        ) from None


def together(world: World, build: Callable[[], T]) -> T:
    """Do on every rank what may fail by a user's mistake; if one fails all end, told once."""
    result, failure = None, None
    try:
        result = build()
    except CropstreamError as error:
        failure = error
    failures = [each for each in world.gather(failure) if each is not None]
    if failures:
        if world.is_first:
            raise failures[0]
        sys.exit(failures[0].exit_code)
    return result  # type: ignore[return-value]


def _build_loader(config: "Config", world: World, checkpoint: Checkpoint | None) -> Loader:
    """Of the packed data sets of the configuration, or of plain tars."""
    build: Callable[..., Loader] = partial(MultiCropLoader, fetch=config.fetch)
    if names_tars(config.loader.dataset):
        build = StreamingLoader
    return build(
        config.loader,
        config.crops,
        config.augment,
        seed=config.train.seed,
        rank=world.rank,
        world_size=world.world_size,
        local_world_size=num_core_sharers(world),
        device=world.device,
        epochs=config.train.epochs,
        state=checkpoint.state["loader"] if checkpoint else None,
        quarantine=checkpoint.state["quarantine"] if checkpoint else (),
    )


def num_core_sharers(world: World) -> int:
    """How many ranks have the cores of this one, itself included.

    Not all of a host: deepspeed's --bind_cores_to_rank and Slurm give each rank cores of its own.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    mine = (socket.gethostname(), cores)
    return world.gather(mine).count(mine)


def _build_engine(config: "Config", world: World) -> Engine:
    torch.manual_seed(config.train.seed)  # every rank draws the same initial weights
    model = build_model(config.model, dist.group.WORLD).to(world.device)
    optim = config.optim
    optimizer = LARC(
        parameter_groups(model),
        lr=config.schedule.base_lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        trust_coefficient=optim.trust_coefficient,
        eps=optim.eps,
        clip=optim.clip,
    )
    return DeepSpeedEngine(model, optimizer, config.engine)


def _build_queue(config: "Config", world: World, loader: Loader) -> FeatureQueue | None:
    """Allocated from the beginning, so that a checkpoint has one shape; used from its start on.

    Raises UsageError for a queue that would never take part.
    """
    if not config.queue.length:
        return None
    _check_queue(config, loader)
    return FeatureQueue(
        config.queue.length,
        config.model.feat_dim,
        len(config.loss.crops_for_assign),
        batch_size=loader.batch_size,
        world_size=world.world_size,
        device=world.device,
    )


def _check_queue(config: "Config", loader: Loader) -> None:
    length, global_batch = config.queue.length, config.loader.global_batch
    if length < global_batch:
        raise UsageError(
            f"queue.length={length} holds no whole global batch of {global_batch}; make it a "
            f"multiple of loader.global_batch, or 0 for no queue"
        )
    start = _queue_start(config, loader.steps_per_epoch)
    total_steps = config.train.epochs * loader.steps_per_epoch
    if start >= total_steps:
        raise UsageError(
            f"the queue would start at step {start}, after the last of the run's {total_steps}; "
            f"lower queue.start_epoch or queue.start_step, or set queue.length=0 for no queue"
        )


def _queue_start(config: "Config", steps_per_epoch: int) -> int:
    queue = config.queue
    return queue.start_step if queue.start_step >= 0 else queue.start_epoch * steps_per_epoch


def _learning_rate(config: "Config", step: int, steps_per_epoch: int) -> float:
    schedule = config.schedule
    warmup = schedule.warmup_steps
    return warmup_cosine(
        step,
        base_lr=schedule.base_lr,
        final_lr=schedule.final_lr,
        start_lr=schedule.start_lr,
        warmup_steps=warmup if warmup >= 0 else schedule.warmup_epochs * steps_per_epoch,
        total_steps=config.train.epochs * steps_per_epoch,
    )


def _read_loss(run: _Run, result: StepResult, batch: Batch) -> float:
    """The mean loss over ranks; here the host waits for the device.

    Raises TrainingError on every rank when the loss of one is not finite, naming its samples.
    """
    world, mine = run.world, result.loss.item()
    loss: float = world.mean([mine]).item()
    if not math.isfinite(loss):
        where = f"{mine} on rank {world.rank}, samples {batch.samples[:8].tolist()}…"
        found = [each for each in world.gather(None if math.isfinite(mine) else where) if each]
        url = run.config.checkpoint.run
        raise TrainingError(
            f"the loss is not finite at step {batch.step} of epoch {batch.epoch}: {found[0]} "
            f"({len(found)} rank(s) in all). Go on from an older checkpoint with a lower "
            f"schedule.base_lr or engine.precision=fp32: `python -m trainer.checkpoint ls {url}` "
            f"lists them, `python -m trainer.checkpoint rm {url} --step N` removes a newer one"
        )
    return loss


class _Clock:
    """Rates between logged steps, and what this process has used."""

    def __init__(self, loader: Loader, first_step: int) -> None:
        self._loader = loader
        self._step = first_step - 1
        self._time = time.perf_counter()

    def lap(self, world: World, step: int) -> dict[str, Any]:
        now = time.perf_counter()
        steps = step - self._step
        seconds = (now - self._time) / steps
        sums = self._loader.telemetry.take()
        self._step, self._time = step, now
        return {
            "images_per_s": self._loader.batch_size * world.world_size / seconds,
            "step_s": seconds,
            **{name: sums.pop(name, 0.0) / steps for name in _WAITS},
            **{f"loader/{name}": amount / steps for name, amount in sorted(sums.items())},
            "world_size": world.world_size,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "time": time.time(),
        }


class _Flag:
    def __init__(self) -> None:
        self._set = False

    def set(self, number: int, frame: FrameType | None) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set


def _catch_sigterm() -> _Flag:
    """SIGTERM announces the end of a spot instance: save, then leave with exit code 3."""
    flag = _Flag()
    signal.signal(signal.SIGTERM, flag.set)
    return flag


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


@contextmanager
def _kept(run: _Run) -> Iterator[None]:
    """A run that fails says what of it is not lost."""
    try:
        yield
    except CropstreamError as error:
        step, url = run.saved_step, run.config.checkpoint.run
        kept = "no checkpoint was written yet"
        if step:
            kept = f"the same command goes on from the checkpoint of step {step} in {url}"
        error.args = (f"{error}\n({kept})",)
        raise


def _conclude(run: _Run, done: int, total_steps: int, num_found: int) -> None:
    """Say why the run ends here, and what it could not use."""
    if not run.world.is_first:
        return
    if done < total_steps:
        _say(
            f"stopped by SIGTERM: the checkpoint of step {done} is committed, the same command "
            f"goes on from there"
        )
    if num_found:
        _say(
            f"{num_found} bad sample(s) were met since the start and replaced by others; the "
            f"checkpoint lists them, `python -m shard_tools verify` finds all there are"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - a run's log begins and ends so


def _announce(run: _Run, total_steps: int) -> None:
    if not run.world.is_first:
        return
    config = run.config
    begun = f"resuming at step {run.first_step}" if run.first_step else "starting"
    lines = [
        f"{begun} of {total_steps}: {run.loader.describe()}; checkpoints in "
        f"{config.checkpoint.run}, logs in {config.train.log_dir} (pid {os.getpid()})"
    ]
    if run.changes:
        lines.append(f"changed since the checkpoint: {', '.join(run.changes)}")
    _say("\n".join(lines))
