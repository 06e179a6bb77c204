"""The loop: data in, a step, figures and checkpoints out. Reads from top to bottom as a run does.

Called by `python -m trainer` and `deepspeed --module trainer`. A run that is started again goes on
from its newest checkpoint and trains on exactly the batches it would have seen.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt

from pipeline.errors import CropstreamError, UsageError
from pipeline.loader import MultiCropLoader
from pipeline.streaming import StreamingLoader
from pipeline.tars import names_tars
from trainer.checkpoint import Checkpoints
from trainer.clock import Loader
from trainer.distributed import World, together
from trainer.engine import DeepSpeedEngine, Engine, divide
from trainer.fragments import Checkpoint
from trainer.metrics import MetricsLog
from trainer.models import build_model
from trainer.optim import LARC, parameter_groups
from trainer.queue import FeatureQueue
from trainer.run import Run, Trained
from trainer.schedule import warmup_cosine
from trainer.step import swav_step
from trainer.trace import Trace

if TYPE_CHECKING:  # config.py collects the sections, ours among them
    from trainer.config import Config

STOPPED = 3  # exit code: a checkpoint was committed, start me again


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Section `train`: how long, from which seed, and how often to report."""

    epochs: Annotated[int, Gt(0)] = 100
    seed: Annotated[int, Ge(0)] = 31
    log_every_steps: Annotated[int, Gt(0)] = 10
    log_dir: str = "build/runs"  # metrics.jsonl and TensorBoard files of this machine
    profile_step: Annotated[int, Ge(-1)] = -1  # from it on steps are traced into log_dir; -1: none
    profile_num_steps: Annotated[int, Gt(0)] = 3
    peak_tflops: Annotated[float, Ge(0)] = 0.0  # of a device, to tell MFU; 0: known by its name


def train(config: "Config", world: World) -> int:
    """Train from the newest checkpoint, or from the beginning, to the end of the last epoch.

    Returns the exit code: 0 done, 3 stopped by SIGTERM after a committed checkpoint.
    """
    stop = _catch_sigterm()
    run = _prepare(config, world, stop)
    queue_start = _queue_start(config, run.loader.steps_per_epoch)
    freeze_steps = config.schedule.freeze_prototypes_steps
    channels_last = config.engine.channels_last
    _announce(run)

    with (
        run.loader,
        together(world, lambda: _open_log(run)) as run.log,
        _telling_what_is_kept(run),
        _trace(config.train, world) as trace,
    ):
        for step, batch in enumerate(run.batches(stop.is_set), start=run.num_steps):
            trace.step(step)
            crops = batch.crops if channels_last else [each.contiguous() for each in batch.crops]
            queue = run.queue if step >= queue_start else None
            queue_used = queue is not None and queue.is_full
            lr = _learning_rate(config, step, run.loader.steps_per_epoch)
            result = swav_step(
                run.engine,
                crops,
                queue=queue,
                num_crops=config.crops.num_crops,
                crops_for_assign=config.loss.crops_for_assign,
                temperature=config.loss.temperature,
                epsilon=config.sinkhorn.epsilon,
                num_iterations=config.sinkhorn.num_iterations,
                lr=lr,
                freeze_prototypes=freeze_steps < 0 or step < freeze_steps,
                hard_codes=config.sinkhorn.hard_codes,
                group=dist.group.WORLD,
                observe=run.is_logged(step),
            )
            figures = {"lr": lr, "queue_used": queue_used}
            images = crops[0][: run.loader.batch_size]
            trained = Trained(step, batch.epoch, batch.samples, result.loss, figures)
            run.note(trained, images, result.observed)
        run.finish()
    _conclude(run)
    return 0 if run.num_steps >= run.total_steps else STOPPED


def _prepare(config: "Config", world: World, stop: "_Flag") -> Run:
    """Everything a run needs, in the state of its newest checkpoint if there is one."""
    checkpoints = together(world, lambda: Checkpoints(config.checkpoint, world))
    checkpoint = checkpoints.latest()
    loader = together(world, lambda: _build_loader(config, world, checkpoint, stop))
    queue = together(world, lambda: _build_queue(config, world, loader))
    together(world, lambda: _check_sizes(config, world, loader))
    checkpoints.prove_writable()
    engine = _build_engine(config, world)
    run = Run(config, world, checkpoints, loader, engine, queue)
    if checkpoint is not None:
        run.resume(checkpoint)
    return run


def _trace(config: TrainConfig, world: World) -> Trace:
    return Trace(config.log_dir, config.profile_step, config.profile_num_steps, world)


def _open_log(run: Run) -> AbstractContextManager[MetricsLog | None]:
    if not run.world.is_first:
        return nullcontext()
    directory = run.config.train.log_dir
    try:
        return MetricsLog(
            directory,
            history=run.history,
            first_step=run.num_steps,
            total_steps=run.total_steps,
        )
    except OSError as error:
        raise UsageError(
            f"cannot write logs to train.log_dir={directory}: {error.strerror or error}; "
            f"give it a folder of this machine that can be written to"
        ) from None


@contextmanager
def _telling_what_is_kept(run: Run) -> Iterator[None]:
    try:
        yield
    except CropstreamError as error:
        error.args = (f"{error}\n({run.kept})",)
        raise


def _build_loader(
    config: "Config", world: World, checkpoint: Checkpoint | None, stop: "_Flag"
) -> Loader:
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
        is_stopped=stop.is_set,
    )


def num_core_sharers(world: World) -> int:
    """How many ranks have the cores of this one, itself included.

    Not all of a host: deepspeed's --bind_cores_to_rank and Slurm give each rank cores of its own.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    mine = (socket.gethostname(), cores)
    return world.gather(mine).count(mine)


def _check_sizes(config: "Config", world: World, loader: Loader) -> None:
    """Raises UsageError for parts and groups that do not divide what they are parts of."""
    parts, ranks = config.engine.accumulation_steps, config.model.batchnorm_ranks
    if loader.batch_size % parts:
        raise UsageError(
            f"engine.accumulation_steps={parts} does not divide the {loader.batch_size} images a "
            f"rank has of loader.global_batch={config.loader.global_batch}"
        )
    if ranks and world.world_size % ranks:
        raise UsageError(
            f"model.batchnorm_ranks={ranks} does not divide the {world.world_size} ranks; 0 is all "
            f"of them"
        )


def _build_engine(config: "Config", world: World) -> Engine:
    torch.manual_seed(config.train.seed)  # every rank draws the same initial weights
    model = build_model(
        config.model,
        world.group_of(config.model.batchnorm_ranks),
        device=world.device,
        each=divide if config.engine.zero_stage == 3 else None,
    )
    optim = config.optim
    optimizer = LARC(
        parameter_groups(model, exclude_bias_and_norm=optim.exclude_bias_and_norm),
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


def _conclude(run: Run) -> None:
    """Say why the run ends here, and what it could not use."""
    if not run.world.is_first:
        return
    if run.num_steps < run.total_steps:
        _say(f"stopped by SIGTERM at step {run.num_steps}: {run.kept}")
    if run.num_found:
        _say(
            f"{run.num_found} bad sample(s) were met since the start and replaced by others; the "
            f"checkpoint lists them, `python -m shard_tools verify` finds all there are"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - a run's log begins and ends so


def _announce(run: Run) -> None:
    if not run.world.is_first:
        return
    config = run.config
    begun = f"resuming at step {run.num_steps}" if run.num_steps else "starting"
    lines = [
        f"{begun} of {run.total_steps}: {run.loader.describe()}; checkpoints in "
        f"{config.checkpoint.run}, logs in {config.train.log_dir} (pid {os.getpid()})"
    ]
    if run.changes:
        lines.append(f"changed since the checkpoint: {', '.join(run.changes)}")
    _say("\n".join(lines))
