"""What a run would take, told without starting it: `python -m trainer --plan … world_size=N`.

Memory of a rank under every ZeRO stage, arithmetic, expected time of a step on known devices, size
and time of a checkpoint. The model is never allocated: its step is rehearsed on fake tensors
(trainer.rehearsal).

What a rank keeps, in bytes a parameter, W ranks, as this engine runs DeepSpeed 0.19 (counted on the
CPU in runs of one and two ranks; tests/trainer/test_plan.py counts again):

    stage      weights   masters   momentum   gradients
    0          4         -         4          4
    1          4         4/W       4/W        4 while they are computed, then 4/W
    2          4         4/W       4/W        4/W
    3          4/W       4/W       4/W        4/W, and the weights at work
    offload    as above  in host memory, 16/W with gradients and a staging buffer

Stage 3 gathers at most stage3_max_live_parameters at once. What dominates it is none of these: a
weight's gradient is complete when the images of both resolutions have gone through it, so until
then a whole model's gradients of the first resolution wait on every rank ("step").
"""

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config import load_config
from pipeline.errors import ConfigError, UsageError
from trainer.config import Config
from trainer.engine import BUCKET_ELEMENTS
from trainer.flops import PEAKS, flops_per_image, forward_flops
from trainer.models import meta_model
from trainer.rehearsal import Rehearsal, rehearse

DEVICE_GIB = (16, 32, 40, 80, 141)  # sizes that devices are sold in

_LIVE_BYTES = 4 * 10**9  # stage3_max_live_parameters, 10⁹, in float32
_FLATTENED_BYTES = 2 * 10**9  # of gradients that stage 0 sums at once (5·10⁸ elements)
# Context and kernels of CUDA, buffers of NCCL, workspaces of cuDNN, and what the allocator cannot
# use: assumed, not measured.
_OTHER_BYTES = 2 * 10**9
_USABLE = 0.97  # of a device's memory: the driver keeps some


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What cannot be known beforehand.

    utilisation: share of a device's peak that the step's operations reach, those done twice
    included. The published runs of SwAV (91 images/s) and SEER's 256GF (2.8 images/s) come to 0.06
    and 0.12 of a V100's; 0.2 is hoped of newer software.
    store_mb_per_s: what a rank writes to the store; one stream to S3 makes about 85.
    num_images: of the data set, 0 if it is not known.
    """

    utilisation: float = 0.2
    store_mb_per_s: float = 85.0
    num_images: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.utilisation <= 1 and self.store_mb_per_s > 0 and self.num_images >= 0):
            raise UsageError(
                f"--utilisation is a share above 0 and up to 1, --store-mb-per-s above 0, "
                f"--images at least 0; got {self.utilisation}, {self.store_mb_per_s}, "
                f"{self.num_images}"
            )


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """What a rank holds at most, in bytes, under one ZeRO stage; `host` is outside the device.

    gathered: weights at work under stage 3. buffers: of collectives. step: what forward and
    backward pass add to the rest at their worst moment, activations most of all.
    """

    zero_stage: int
    offload: str
    weights: int
    gathered: int
    masters: int
    momentum: int
    gradients: int
    buffers: int
    step: int
    crops: int
    queue: int
    other: int
    host: int

    @property
    def device(self) -> int:
        """All of it that lies on the device."""
        parts = asdict(self)
        return sum(parts[name] for name in _PARTS)

    @property
    def smallest_device_gib(self) -> int | None:
        """The smallest of `DEVICE_GIB` that it fits; None if none does."""
        return next((g for g in DEVICE_GIB if self.device <= g * 2**30 * _USABLE), None)


_PARTS = (
    *("weights", "gathered", "masters", "momentum", "gradients", "buffers", "step"),
    *("crops", "queue", "other"),
)


@dataclass(frozen=True, kw_only=True)
class DeviceTime:
    """An expected step on one kind of device."""

    name: str
    peak_tflops: float
    step_s: float
    images_per_s: float  # of all ranks


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` finds out; sizes in bytes, operations as in trainer.flops."""

    world_size: int
    backbone: str
    num_parameters: int
    global_batch: int
    batch_size: int  # of a rank
    images_at_once: int  # of these, in one part of the step
    flops_per_image: int  # of the model
    flops_per_rank_step: int  # with what is computed twice
    memory: tuple[RankMemory, ...]
    times: tuple[DeviceTime, ...]
    checkpoint_bytes: int
    checkpoint_s: float
    steps_per_epoch: int | None
    num_steps: int | None  # of the run
    configured: tuple[int, str]  # stage and offload
    precision: str
    assumptions: Assumptions


def plan(config: Config, world_size: int, assumptions: Assumptions) -> Plan:
    """Plan a run of `world_size` ranks. Raises UsageError for a batch that cannot be divided."""
    batch_size, part = _divide_batch(config, world_size)
    module = meta_model(config.model)
    sizes = [each.nbytes for each in module.parameters()]
    num_scored = batch_size + config.queue.length // world_size
    rehearsal = rehearse(config, batch_size=part, num_scored=num_scored)
    flops = _flops_per_rank_step(config, rehearsal, batch_size)
    buffer_bytes = sum(each.nbytes for each in module.buffers())
    checkpoint_bytes = 2 * sum(sizes) + buffer_bytes + _queue_bytes(config)  # weights, momentum
    steps = assumptions.num_images // config.loader.global_batch or None
    return Plan(
        world_size=world_size,
        backbone=config.model.backbone,
        num_parameters=sum(sizes) // 4,
        global_batch=config.loader.global_batch,
        batch_size=batch_size,
        images_at_once=part,
        flops_per_image=flops_per_image(config),
        flops_per_rank_step=flops,
        memory=tuple(_memory(config, sizes, world_size, batch_size, rehearsal)),
        times=tuple(_times(config, flops, assumptions)),
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_s=checkpoint_bytes / world_size / (assumptions.store_mb_per_s * 1e6),
        steps_per_epoch=steps,
        num_steps=steps and steps * config.train.epochs,
        configured=(config.engine.zero_stage, config.engine.offload),
        precision=config.engine.precision,
        assumptions=assumptions,
    )


def load_plan_config(path: str | None, arguments: Sequence[str]) -> tuple[Config, int]:
    """The configuration and the world size of `--plan`.

    `arguments` are overrides, among them `world_size=N` (1 without it). Where data and run lie need
    not be known. Raises ConfigError.
    """
    sizes = [each for each in arguments if each.startswith("world_size=")]
    overrides = [each for each in arguments if each not in sizes]
    return load_config(Config, path, [*_places(path, overrides), *overrides]), _world_size(sizes)


def _world_size(arguments: Sequence[str]) -> int:
    text = arguments[-1].partition("=")[2] if arguments else "1"
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"world_size={text}: give a number of ranks, as world_size=8")
    return int(text)


def _places(path: str | None, overrides: Sequence[str]) -> list[str]:
    """Overrides that fill in where data and run lie, if nothing else does."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):  # load_config says what is wrong with it
        tree = {}
    given = {
        f"{name}.{key}" for name, part in tree.items() if isinstance(part, dict) for key in part
    }
    given |= {each.partition("=")[0] for each in overrides}
    places = [] if given & {"loader.dataset", "loader.mix"} else ["loader.dataset=unknown"]
    return places if "checkpoint.run" in given else [*places, "checkpoint.run=unknown"]


def _divide_batch(config: Config, world_size: int) -> tuple[int, int]:
    """Images of a rank, and of one part of its step."""
    ranks_and_parts = world_size * config.engine.accumulation_steps
    if config.loader.global_batch % ranks_and_parts:
        raise UsageError(
            f"loader.global_batch={config.loader.global_batch} cannot be divided over "
            f"{world_size} ranks with engine.accumulation_steps="
            f"{config.engine.accumulation_steps}: make it a multiple of {ranks_and_parts}"
        )
    return (
        config.loader.global_batch // world_size,
        config.loader.global_batch // ranks_and_parts,
    )


def _queue_bytes(config: Config) -> int:
    """Of all ranks together."""
    assigned = len(config.loss.crops_for_assign)
    length = config.queue.length - config.queue.length % config.loader.global_batch
    return 4 * assigned * length * config.model.feat_dim


def _flops_per_rank_step(config: Config, rehearsal: Rehearsal, batch_size: int) -> int:
    """With recomputed activations, and with the first pass over the global crops if in parts."""
    parts = config.engine.accumulation_steps
    flops = batch_size * flops_per_image(config) + parts * rehearsal.recomputed_flops
    if parts > 1:
        flops += batch_size * forward_flops(config.model, config.crops.groups[:1])
    return flops


def _memory(
    config: Config,
    sizes: Sequence[int],
    world_size: int,
    batch_size: int,
    rehearsal: Rehearsal,
) -> list[RankMemory]:
    """Under every stage. `sizes` are those of the parameters, in bytes."""
    pixels = sum(each.count * 3 * each.size_px**2 for each in config.crops.groups)
    shared = {
        "crops": (4 + 1) * pixels * batch_size,  # this step's in float32, the next one's in uint8
        "queue": 2 * _queue_bytes(config) // world_size,  # old and new while a batch enters
        "other": _OTHER_BYTES,
    }
    buckets = 4 * BUCKET_ELEMENTS * (2 if config.engine.overlap_communication else 1)
    return [
        RankMemory(
            zero_stage=stage,
            offload=offload,
            step=_step_bytes(config, stage, sum(sizes), rehearsal),
            **_state(stage, offload, sizes, world_size, buckets),
            **shared,
        )
        for stage in range(4)
        for offload in (("none", "cpu") if stage else ("none",))
    ]


def _step_bytes(config: Config, stage: int, whole: int, rehearsal: Rehearsal) -> int:
    """What a step adds to the state; `whole` gradients are part of that in stages 0 and 1."""
    if stage >= 2 or config.engine.accumulation_steps > 1:  # in the second part they are all there
        return rehearsal.peak
    return rehearsal.peak_keeping - whole


def _state(
    stage: int, offload: str, sizes: Sequence[int], world_size: int, buckets: int
) -> dict[str, int]:
    """The table at the top."""
    whole, largest = sum(sizes), max(sizes)
    share = math.ceil(whole / world_size)
    on_device = 0 if offload == "cpu" else share
    return {
        "weights": share if stage == 3 else whole,
        "gathered": min(whole, max(_LIVE_BYTES, largest)) if stage == 3 else 0,
        "masters": on_device if stage else 0,
        "momentum": on_device if stage else whole,
        "gradients": whole if stage < 2 else on_device,
        # What is larger than a bucket travels alone, and stage 3 copies it to divide it.
        "buffers": max(buckets, largest) if stage else min(whole, _FLATTENED_BYTES),
        "host": 4 * share if offload == "cpu" else 0,
    }


def _times(config: Config, flops: int, assumptions: Assumptions) -> list[DeviceTime]:
    """On the devices whose peak in the configured precision is known."""
    found = []
    for device in PEAKS:
        if (peak := device.of(config.engine.precision)) is not None:
            step_s = flops / (peak * 1e12 * assumptions.utilisation)
            found.append(
                DeviceTime(
                    name=device.name,
                    peak_tflops=peak,
                    step_s=step_s,
                    images_per_s=config.loader.global_batch / step_s,
                )
            )
    return found


# --------------------------------------------------------------------------------------------------
# what is printed


def to_json(plan: Plan) -> str:
    """All of it, sizes in bytes."""
    document: dict[str, Any] = asdict(plan)
    for row, memory in zip(document["memory"], plan.memory, strict=True):
        row |= {"device": memory.device, "smallest_device_gib": memory.smallest_device_gib}
    return json.dumps(document, indent=2)


def to_text(plan: Plan) -> str:
    """Tables for people, sizes in GB of 10⁹ bytes."""
    return "\n".join([*_summary(plan), "", *_memory_table(plan), "", *_time_table(plan)])


def _summary(plan: Plan) -> list[str]:
    again = plan.flops_per_rank_step / (plan.flops_per_image * plan.batch_size) - 1
    parts = f", {plan.images_at_once} at once" if plan.images_at_once < plan.batch_size else ""
    rate = plan.assumptions.store_mb_per_s
    lines = [
        f"model       {plan.backbone}, {plan.num_parameters:,} parameters, "
        f"{4 * plan.num_parameters / 1e9:.2f} GB in float32",
        f"step        {plan.global_batch:,} images on {plan.world_size:,} rank(s), "
        f"{plan.batch_size} a rank{parts}",
        f"arithmetic  {plan.flops_per_image / 1e9:,.1f} GFLOP an image, forward and backward"
        + (f"; {again:.0%} more is computed again" if again > 0.005 else ""),
        f"checkpoint  {plan.checkpoint_bytes / 1e9:.2f} GB, "
        f"{plan.checkpoint_bytes / plan.world_size / 1e6:,.0f} MB a rank: {plan.checkpoint_s:.1f} s"
        f" (assumed: {rate:g} MB/s a rank, --store-mb-per-s)",
    ]
    if plan.steps_per_epoch and plan.num_steps:
        lines.append(
            f"length      {plan.steps_per_epoch:,} steps an epoch, {plan.num_steps:,} in all"
        )
    return lines


def _memory_table(plan: Plan) -> list[str]:
    lines = [
        "memory of a rank, at most, in GB (10⁹ bytes); fits: the smallest device of "
        f"{', '.join(map(str, DEVICE_GIB))} GiB",
        "  stage offload "
        + "".join(f"{name:>10}" for name in (*_PARTS, "device", "host"))
        + "  fits",
    ]
    for memory in plan.memory:
        parts = asdict(memory) | {"device": memory.device}
        sizes = "".join(f"{parts[name] / 1e9:10.2f}" for name in (*_PARTS, "device", "host"))
        gib = memory.smallest_device_gib
        mark = ">" if (memory.zero_stage, memory.offload) == plan.configured else " "
        fits = f"{gib} GiB" if gib else "none"
        lines.append(f"{mark} {memory.zero_stage:>5} {memory.offload:7} {sizes}  {fits}")
    lines.append("  > is configured; other, for CUDA, NCCL and cuDNN, is assumed and not measured")
    return lines


def _time_table(plan: Plan) -> list[str]:
    lines = [
        f"time of a step in {plan.precision} (assumed: {plan.assumptions.utilisation:.0%} of the "
        "device's peak, --utilisation; waits for data and for other ranks not counted)",
        f"  {'device':12}{'peak TFLOP/s':>14}{'step s':>10}{'images/s':>12}"
        + (f"{'run h':>10}" if plan.num_steps else ""),
    ]
    for each in plan.times:
        hours = f"{plan.num_steps * each.step_s / 3600:10.1f}" if plan.num_steps else ""
        lines.append(
            f"  {each.name:12}{each.peak_tflops:14,.1f}{each.step_s:10.3f}"
            f"{each.images_per_s:12,.0f}{hours}"
        )
    return lines
