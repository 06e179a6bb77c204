"""What the loader's worker processes cost, and what they spare the training loop.

Memory beside the byte budget, over an epoch; the time to start, and to go on without a worker that
was killed or stands still; images a second with two threads or processes against one; and the
hand-over with a training loop running beside: the loader in processes against the very same in
threads of the loop's process (`loader.workers=0`). The loop is SwAV's real step through all layers
of a ResNet-50 so narrow, on crops so small, that Python and the dispatcher are what it costs, as
they are where a GPU does the arithmetic: there a loader that holds the interpreter lock shows.
"""

import functools
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torchvision.models.resnet import Bottleneck

from pipeline.augment import AugmentConfig
from pipeline.cores import usable_cores
from pipeline.crops import CropsConfig
from pipeline.loader import CutBatch, LoaderConfig, MultiCropLoader
from pipeline.processes import cpu_seconds
from tests.bench.photographs import TRAIN, photographs
from tests.bench.rows import Row
from tests.support.dataset import write_dataset
from trainer.engine import PlainEngine
from trainer.models import SwAVModel
from trainer.models.resnet import ResNet
from trainer.optim import LARC, parameter_groups
from trainer.step import swav_step

GROUP = "loader."

IMAGES, BATCH = 2048, 64
ROUNDS = 5
SECONDS = 6.0  # of a measurement
TURN_S, SETTLING_BATCHES = 1.5, 6  # batches: more than are ever ready ahead
QUIET_CORES, PATIENCE_S = 0.1, 180.0  # used by others; how long to wait for such turns
MOST_OTHERS = 0.3  # cores: with more of them at work a ratio says nothing of ours
LARGE_CHUNKS = {"lanes": 8, "chunk": 32, "window": 2}  # reads of 1.4 MB, as of a large data set
TINY = CropsConfig(global_size_px=32, local_crops=0)


def rows() -> Iterator[Row]:
    """Measure on photographs of 500x375, 2x224 + 6x96 crops, without colour."""
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, list(photographs(IMAGES, TRAIN)), per_shard=256)
        yield from memory(folder)
        yield from recovery(folder)
        yield from hand_over(folder)
        yield from scaling(folder)


def memory(folder: str) -> Iterator[Row]:
    """Resident memory of a rank's workers, without what they hold of encoded samples."""
    with loader_of(folder, workers=1, epochs=3) as loader:
        start = time.perf_counter()
        batches = loader.cut_batches()
        next(batches)
        startup_s = time.perf_counter() - start
        in_flight_bytes = loader._ahead_bytes
        peaks = [0, 0, 0]  # of each epoch
        for batch in batches:
            peaks[batch.epoch] = max(peaks[batch.epoch], worker_bytes())
    note = f"peak of 1 worker, 2 threads, less {in_flight_bytes >> 20} MiB in flight"
    beside = max(peaks) - in_flight_bytes
    yield Row("loader.rss", beside / 1e6, "MB", target="<= 700", note=note)
    growth = (peaks[2] - peaks[1]) / 1e6
    yield Row("loader.rss_growth", growth, "MB", target="<= 20", note="from epoch 2 to epoch 3")
    yield Row("loader.startup", startup_s, "s", note="to the first batch of 64, numba cached")


def recovery(folder: str) -> Iterator[Row]:
    """Seconds from a worker's misfortune until its successor has made more than was ready."""
    misfortunes = {
        "killed": (signal.SIGKILL, "by SIGKILL, as when memory is short"),
        "stopped": (signal.SIGSTOP, "which is noticed after loader.decode_timeout_s=20"),
    }
    for name, (number, note) in misfortunes.items():
        with loader_of(folder, workers=1) as loader:
            batches = loader.cut_batches()
            _take(batches, SETTLING_BATCHES)
            (pid,) = _workers()
            os.kill(pid, number)
            start = time.perf_counter()
            _take(batches, SETTLING_BATCHES)
            seconds = time.perf_counter() - start
            assert loader.telemetry.total("worker_restarts") == 1
        yield Row(f"loader.{name}_worker", seconds, "s", "<= 30", note)


def hand_over(folder: str) -> Iterator[Row]:
    """A training loop with the loader beside it, in processes and in threads, in turn."""
    step = training_step()
    quiet: list[float] = []
    beside: dict[int, list[tuple[float, float]]] = {1: [], 0: []}
    run_for(SECONDS, step)
    for _ in range(ROUNDS):
        quiet.append(run_for(SECONDS, step))
        for workers, measured in beside.items():
            measured.append(with_loader(folder, step, workers=workers, threads=1))
    alone_s = statistics.median(quiet)
    yield Row(
        "loader.step_alone", alone_s * 1e3, "ms", note="SwAV, 50 layers, 8 channels wide, 2x32 px"
    )
    for workers, name in ((1, "process"), (0, "thread")):
        slower = statistics.median(
            step_s / own for (step_s, _), own in zip(beside[workers], quiet, strict=True)
        )
        rate = statistics.median(rate for _, rate in beside[workers])
        note = "the loop's step with the loader in a decoding " + name + ", against alone"
        yield Row(f"loader.step_beside_{name}", slower, "x", note=note)
        yield Row(f"loader.rate_beside_{name}", rate, "images/s", note="while the loop runs")


def scaling(folder: str) -> Iterator[Row]:
    """Images a second of wall time: two threads, and two processes, against one.

    Cores that other processes use are none of ours, so all take short turns, and what counts are
    the turns in which the rest of the machine was quietest.
    """
    means = {"one": (1, 1), "two_threads": (1, 2), "two_processes": (2, 1)}
    with ExitStack() as stack:
        batches = {}
        for name, (workers, threads) in means.items():
            settings = {"workers": workers, "threads": threads, **LARGE_CHUNKS}
            loader = stack.enter_context(loader_of(folder, **settings))
            batches[name] = loader.cut_batches()
        turns = quietest_turns(batches)
    rates = {name: statistics.median(turn.rate for turn in taken) for name, taken in turns.items()}
    for name in ("two_threads", "two_processes"):
        others = max(turn.others for turn in (*turns["one"], *turns[name]))
        ratio = rates[name] / rates["one"] if others < MOST_OTHERS else None
        note = (
            f"{usable_cores()} cores; one: {rates['one']:.0f} images/s with "
            f"{statistics.median(turn.cores for turn in turns['one']):.2f} cores, two with "
            f"{statistics.median(turn.cores for turn in turns[name]):.2f}, while others used "
            f"{others:.2f} at most{'' if ratio else ': too much to tell'}"
        )
        yield Row(f"loader.{name}_vs_one", ratio, "x", ">= 1.8", note)


@dataclass(frozen=True)
class Turn:
    """Images a second, the cores that took, and those that were used by other processes."""

    rate: float
    cores: float
    others: float


def quietest_turns(loaders: Mapping[str, Iterator[CutBatch]]) -> dict[str, list[Turn]]:
    """Of every loader, from turns of them all, until enough were quiet or it takes too long."""
    turns: dict[str, list[Turn]] = {name: [] for name in loaders}
    deadline = time.perf_counter() + PATIENCE_S
    while True:
        for name, batches in loaders.items():
            turns[name].append(take_turn(batches))
        quietest = {
            name: sorted(taken, key=lambda turn: turn.others)[:ROUNDS]
            for name, taken in turns.items()
        }
        enough = all(len(taken) == ROUNDS for taken in quietest.values())
        quiet = all(turn.others < QUIET_CORES for taken in quietest.values() for turn in taken)
        if enough and (quiet or time.perf_counter() > deadline):
            return quietest


def take_turn(batches: Iterator[CutBatch]) -> Turn:
    """Take batches for a while, after those that were made while it was nobody's turn."""
    _take(batches, SETTLING_BATCHES)
    start, own, all_s, num_images = time.perf_counter(), cpu_seconds(), machine_cpu_s(), 0
    while (wall_s := time.perf_counter() - start) < TURN_S:
        num_images += len(next(batches).samples)
    own, all_s = cpu_seconds() - own, machine_cpu_s() - all_s
    return Turn(num_images / wall_s, own / wall_s, max(0.0, all_s - own) / wall_s)


def _take(batches: Iterator[CutBatch], count: int) -> None:
    for _ in islice(batches, count):
        pass


def machine_cpu_s() -> float:
    """CPU seconds of everybody on this machine, what a hypervisor took for others included."""
    ticks = list(map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]))
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")


def loader_of(folder: str, *, epochs: int | None = None, **settings: Any) -> MultiCropLoader:
    sizes = {"global_batch": BATCH, "lanes": 16, "threads": 2} | settings
    config = LoaderConfig(dataset=folder, **sizes)
    return MultiCropLoader(config, CropsConfig(), AugmentConfig(), seed=0, epochs=epochs)


@contextmanager
def loading(folder: str, **settings: Any) -> Iterator[Callable[[], int]]:
    """A loader that runs as fast as it can in the background; yields how many images it made."""
    made = [0]
    ready, stop = threading.Event(), threading.Event()

    def run() -> None:
        with loader_of(folder, **settings) as loader:
            for batch in loader.cut_batches():
                made[0] += len(batch.samples)
                if batch.step >= 2:
                    ready.set()
                if stop.is_set():
                    return

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        yield lambda: made[0]
    finally:
        stop.set()
        thread.join()


def with_loader(folder: str, step: Callable[[], object], **settings: Any) -> tuple[float, float]:
    """Seconds a training step beside a loader, and the loader's images a second."""
    step_s = [0.0]

    def run() -> None:
        step_s[0] = run_for(SECONDS, step)

    with loading(folder, **settings) as count:
        rate = rate_of(count, run)
    return step_s[0], rate


def rate_of(count: Callable[[], int], work: Callable[[], None]) -> float:
    start, first = time.perf_counter(), count()
    work()
    return (count() - first) / (time.perf_counter() - start)


def run_for(seconds: float, step: Callable[[], object]) -> float:
    """Do steps for a while; the median step's seconds."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def training_step() -> Callable[[], object]:
    """SwAV's step with the depth of a ResNet-50 and next to no arithmetic."""
    torch.manual_seed(0)
    model = SwAVModel(ResNet(Bottleneck, (3, 4, 6, 3), stem_width=8), 64, 16, 8)
    optimizer = LARC(parameter_groups(model), lr=0.1, momentum=0.9, weight_decay=1e-6)
    crops = [torch.randn(2 * 2, 3, TINY.global_size_px, TINY.global_size_px)]
    return functools.partial(
        swav_step,
        PlainEngine(model, optimizer),
        crops,
        queue=None,
        num_crops=2,
        crops_for_assign=(0, 1),
        temperature=0.1,
        epsilon=0.05,
        num_iterations=3,
        lr=0.1,
        freeze_prototypes=False,
    )


def worker_bytes() -> int:
    """Resident memory of the only worker, without the ring, which is counted in every process."""
    (pid,) = _workers()
    status = Path(f"/proc/{pid}/status").read_text()
    figures = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return (int(figures["VmRSS"].split()[0]) - int(figures["RssShmem"].split()[0])) * 1024


def _workers() -> list[int]:
    """The loader workers among this process's children."""
    tasks = Path("/proc/self/task").iterdir()
    children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return [
        pid for pid in children if b"pipeline.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
