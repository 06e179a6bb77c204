"""What reaches a CUDA device, and what the device waits for; skipped where there is none.

One process, real decoding included, photographs of 500x375 from local disk, 2x224 + 6x96 crops.
First the loader alone, into the device; then SwAV's ResNet-50 trained by the real command, whose
log says how much of a step was spent waiting for data. The cores that a GPU needs are those that
prepare what it trains on once it waits for nothing.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pipeline.augment import AugmentConfig
from pipeline.cores import usable_cores
from pipeline.crops import CropsConfig
from pipeline.loader import LoaderConfig, MultiCropLoader
from pipeline.processes import cpu_seconds
from tests.bench.photographs import TRAIN, photographs
from tests.bench.rows import Row
from tests.support.dataset import write_dataset
from tests.support.launch import read_metrics, run_module

GROUP = "loader."

IMAGES, BATCH = 8192, 256
WARM_BATCHES, BATCHES = 20, 200
EPOCHS = 20
CONFIG = (
    *("--config", "configs/swav_rn50_bs256.toml", "engine.precision=bf16", "queue.length=0"),
    *(f"loader.global_batch={BATCH}", f"train.epochs={EPOCHS}", "train.log_every_steps=10"),
    "checkpoint.every_steps=1000000",
)
NAMES = {
    "loader.cuda_images_per_s": "images/s",
    "loader.cuda_data_wait_share": "of a step",
    "loader.cuda_cores_per_gpu": "cores",
}


@dataclass(frozen=True)
class Trained:
    """Of a run's steps, without those in which it warmed up."""

    images_per_s: float
    wait_share: float


def rows() -> Iterator[Row]:
    """Images a second into the device, the share of waiting, and the cores a GPU needs."""
    if not torch.cuda.is_available():
        yield from (Row(name, None, unit, note="no CUDA device") for name, unit in NAMES.items())
        return
    device, cores = torch.cuda.get_device_name(), usable_cores()
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(f"{folder}/data", list(photographs(IMAGES, TRAIN)), per_shard=1024)
        images_per_s, cpu_s = load(f"{folder}/data")
        trained = train(Path(folder), CONFIG, _cuda())
    unhindered = trained.images_per_s / (1 - trained.wait_share)
    note = f"{device}, {cores} cores; trains on {trained.images_per_s:,.0f} images/s in bf16"
    values = (images_per_s, trained.wait_share, unhindered * cpu_s)
    for (name, unit), value in zip(NAMES.items(), values, strict=True):
        yield Row(name, value, unit, note=note)


def load(url: str, device: str = "cuda") -> tuple[float, float]:
    """Images a second into a device, finished crops, and CPU seconds an image."""
    config = LoaderConfig(dataset=url, global_batch=BATCH)
    with MultiCropLoader(config, CropsConfig(), AugmentConfig(), seed=0, device=device) as loader:
        batches = iter(loader)
        _consume(batches, WARM_BATCHES, loader.device)
        start, cpu_s = time.perf_counter(), cpu_seconds()
        _consume(batches, BATCHES, loader.device)
        seconds, cpu_s = time.perf_counter() - start, cpu_seconds() - cpu_s
    return BATCHES * BATCH / seconds, cpu_s / (BATCHES * BATCH)


def train(folder: Path, arguments: Sequence[str], environment: dict[str, str]) -> Trained:
    """Run the trainer on `folder`/data and read its log, the first third left out."""
    result = run_module(
        *("trainer", *arguments, f"loader.dataset={folder}/data"),
        *(f"checkpoint.run={folder}/run", f"train.log_dir={folder}/log"),
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    records = read_metrics(folder / "log/metrics.jsonl")
    return summarize(records[len(records) // 3 :])


def summarize(records: Sequence[dict[str, Any]]) -> Trained:
    """The rate and the share of waiting of logged steps."""
    waits, steps = ([record[name] for record in records] for name in ("data_wait_s", "step_s"))
    rate = statistics.harmonic_mean([record["images_per_s"] for record in records])
    return Trained(rate, sum(waits) / sum(steps))


def _consume(batches: Iterator[Any], count: int, device: torch.device) -> None:
    for _ in islice(batches, count):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cuda() -> dict[str, str]:
    """Undo what keeps the tests' children on CPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    threads = str(usable_cores())
    return {
        "DS_ACCELERATOR": "cuda",
        "CUDA_VISIBLE_DEVICES": visible.split(",")[0],
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }
