"""Training steps on a CUDA device with synthetic crops, 2x224 + 6x96; skipped where there is none.

Images a second, memory and MFU of the models SwAV and SEER were trained with, each in the memory
formats and with and without torch.compile; what a whole step costs beside its passes; and whether
the host waits for the device in it, by torch's own sync-debug mode.
"""

import gc
import itertools
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from pipeline.crops import CropsConfig
from tests.bench.rows import Row
from tests.bench.step import Stepper, crops_of, engine_of, full_queue
from trainer.distributed import start_world
from trainer.engine import EngineConfig
from trainer.flops import forward_flops, peak_tflops
from trainer.models import ModelConfig

GROUP = "trainer."

WARM_STEPS, STEPS = 5, 20
CASES = {  # row, model, images a step, target
    "rn50": (ModelConfig(), 256, ">= 2000"),
    "regnety_128gf": (
        ModelConfig(
            backbone="regnet_y_128gf",
            hidden_dim=4096,
            num_hidden_layers=2,
            feat_dim=256,
            activation_checkpoints=((2,), (7,), (9, 17), ()),
        ),
        64,
        ">= 100",
    ),
}
FORMATS = {"channels_last": True, "contiguous": False}


@dataclass(frozen=True)
class Speed:
    """Of a step on one device."""

    images_per_s: float
    peak_bytes: int


def rows() -> Iterator[Row]:
    """Every model's best format with its figures, then overhead and host synchronisation."""
    if not torch.cuda.is_available():
        yield from (Row(name, None, unit, target, "no CUDA device") for name, unit, target in NAMES)
        return
    start_world()
    torch.manual_seed(0)
    for name, (model, batch, target) in CASES.items():
        yield from speeds(name, model, batch, target)
    yield overhead()
    yield host_syncs()


NAMES = [
    *(
        (f"trainer.cuda_{name}_{what}", unit, target if what == "images_per_s" else "")
        for name, (_, _, target) in CASES.items()
        for what, unit in (("images_per_s", "images/s"), ("mfu", ""), ("memory", "GB"))
    ),
    ("trainer.cuda_step_overhead", "x", "<= 1.05"),
    ("trainer.cuda_host_syncs", "a step", "<= 0"),
]


def speeds(name: str, model: ModelConfig, batch: int, target: str) -> Iterator[Row]:
    found = {}
    for format_name, channels_last in FORMATS.items():
        for compiles in (False, True):
            config = EngineConfig(precision="bf16", channels_last=channels_last, compile=compiles)
            label = f"{format_name}{', compiled' if compiles else ''}"
            found[label] = speed(model, batch, config)
    best = max(found, key=lambda label: found[label].images_per_s)
    rate, device = found[best].images_per_s, torch.cuda.get_device_name()
    all_rates = ", ".join(f"{label} {each.images_per_s:,.0f}" for label, each in found.items())
    note = f"{device}, bf16, {batch} images; {all_rates}"
    yield Row(f"trainer.cuda_{name}_images_per_s", rate, "images/s", target, note)
    peak = peak_tflops(device, "bf16")
    flops = 3 * forward_flops(model, CropsConfig().groups)
    share = rate * flops / (peak * 1e12) if peak else None
    yield Row(f"trainer.cuda_{name}_mfu", share, "", note=f"{best}; {flops / 1e9:.1f} GFLOP/image")
    yield Row(f"trainer.cuda_{name}_memory", found[best].peak_bytes / 1e9, "GB", note=best)


def speed(model: ModelConfig, batch: int, config: EngineConfig) -> Speed:
    torch.cuda.reset_peak_memory_stats()
    step = stepper(model, batch, config)
    milliseconds = timed(step.run)
    peak_bytes = torch.cuda.max_memory_allocated()
    del step
    gc.collect()
    torch.cuda.empty_cache()
    return Speed(batch / milliseconds * 1e3, peak_bytes)


def stepper(model: ModelConfig, batch: int, config: EngineConfig) -> Stepper:
    crops = [each.cuda() for each in crops_of(batch)]
    if not config.channels_last:
        crops = [each.contiguous() for each in crops]
    queue = full_queue(batch, device="cuda", feat_dim=model.feat_dim)
    return Stepper(engine_of(model, config, device="cuda"), crops, queue)


def timed(run: Callable[[], None]) -> float:
    """The median milliseconds of a step."""
    for _ in range(WARM_STEPS):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    for mark in marks[:-1]:
        mark.record()
        run()
    marks[-1].record()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(other) for one, other in itertools.pairwise(marks))


def overhead() -> Row:
    """The whole step against the same engine's bare passes, in turn."""
    model, batch, _ = CASES["rn50"]
    step = stepper(model, batch, EngineConfig(precision="bf16"))

    def passes() -> None:
        _, scores = step.engine.forward(step.crops)
        scores.square().mean().backward()
        step.engine.module.zero_grad()

    ratios = [timed(step.run) / timed(passes) for _ in range(3)]
    note = f"ResNet-50, {batch} images, bf16, queue, health and log one step in ten"
    return Row("trainer.cuda_step_overhead", statistics.median(ratios), "x", "<= 1.05", note)


def host_syncs() -> Row:
    """Times the host waits for the device in a step that is not logged."""
    model, batch, _ = CASES["rn50"]
    config = replace(EngineConfig(precision="bf16"), zero_stage=1)
    step = stepper(model, batch, config)
    for _ in range(WARM_STEPS):
        step.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught if "synchroniz" in str(each.message)]
    note = "ZeRO 1; " + "; ".join(sorted({f"{w.filename}:{w.lineno}" for w in waits}))[:200]
    return Row("trainer.cuda_host_syncs", len(waits), "a step", "<= 0", note)
