"""`make demo`: the whole road on real images in a few minutes, with nothing but this machine.

    python -m tests.demo.run [--images DIR] [--work build/demo]

A real S3 server on loopback, pictures packed into shards and verified, a small ResNet pretrained by
two ranks under the `deepspeed` launcher, killed with SIGKILL in mid-epoch, resumed from the store,
and evaluated. stdout is the table at the end, stderr the progress.
"""

import argparse
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import load_config
from pipeline.errors import CropstreamError
from pipeline.loader import Batch, MultiCropLoader
from tests.demo.children import Child
from tests.demo.images import write_pictures
from tests.support.s3_server import S3Server
from trainer.config import Config
from trainer.report import Curve, Metrics, Table, read_metrics, training_curves, write_report

CONFIG = "configs/demo.toml"
PICTURES = 600
NUM_RANKS = 2
SHARD_BYTES = 2_000_000
"""Small, so that a few hundred pictures make several shards."""
KILL_AFTER = 0.65
"""Share of the run after which it is killed, at the next step that fits."""
STALL_S = 180.0
NUM_CROP_ROWS = 24
NEIGHBOURS = 10


class DemoError(Exception):
    """A stage failed; the message says where its log is and what to do."""


@dataclass(frozen=True)
class Place:
    """Where this demo keeps what."""

    work: Path

    @property
    def pictures(self) -> Path:
        return self.work / "pictures"

    @property
    def store(self) -> Path:
        return self.work / "store"

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    @property
    def metrics(self) -> Path:
        return self.work / "run" / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.work / "report.html"

    @property
    def gallery(self) -> Path:
        return self.work / "gallery.html"

    def clear(self) -> None:
        """Remove what an earlier demo left, all but its pictures."""
        for folder in (self.store, self.logs, self.metrics.parent):
            shutil.rmtree(folder, ignore_errors=True)
        self.logs.mkdir(parents=True)


@dataclass(frozen=True)
class Training:
    """What the two launches of the training run showed."""

    metrics: Metrics
    killed_step: int
    resumed_step: int
    resume_s: float
    seconds: float

    @property
    def steps_lost(self) -> int:
        return self.killed_step + 1 - self.resumed_step


_started = time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.demo.run", description=__doc__)
    parser.add_argument("--images", type=Path, metavar="DIR", help="your images; default: ours")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), metavar="DIR")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_demo(Place(arguments.work.resolve()), arguments.images)
    except (DemoError, CropstreamError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130
    return 0


def run_demo(place: Place, images: Path | None) -> None:
    """All stages, then the table and the report. Raises DemoError."""
    place.clear()
    source = images.resolve() if images else _make_pictures(place)
    _say("starting an S3 server on loopback")
    with _serving(place) as server:
        os.environ.update(server.environment)
        bucket = server.make_bucket("demo")
        dataset, run = f"{bucket}/images", f"{bucket}/runs/demo"

        _say(f"packing {source} into shards at {dataset}")
        sizes = ["--shard-bytes", str(SHARD_BYTES)]
        packed = _json_of(place, "pack", "shard_tools", "pack", str(source), dataset, *sizes)
        _say("verifying: every byte is read back")
        verified = _json_of(place, "verify", "shard_tools", "verify", dataset)
        found = _json_of(place, "stats", "shard_tools", "stats", dataset)
        page = ("--output", str(place.gallery))
        _json_of(place, "gallery", "shard_tools", "gallery", dataset, *page)

        overrides = _overrides(place, dataset, run, num_images=found["kept"])
        config = load_config(Config, CONFIG, overrides)
        training = train(place, config, overrides, num_images=found["kept"])
        knn = _evaluate(place, dataset, run) if len(found["labels"]) > 1 else None

        _say("drawing the report")
        rows = summary(packed, verified, training, knn, config)
        _write_report(place, rows, training, config)
    print("\n" + _aligned(rows))
    print(f"\nreport:  {place.report}")
    print(f"gallery: {place.gallery}, the images that were packed")


# Training


def train(place: Place, config: Config, overrides: list[str], *, num_images: int) -> Training:
    """Train, kill in mid-epoch, resume, finish. Raises DemoError."""
    steps_per_epoch = num_images // config.loader.global_batch
    kill_step = choose_kill_step(
        config.train.epochs * steps_per_epoch, steps_per_epoch, config.checkpoint.every_steps
    )
    _say(f"pretraining with {NUM_RANKS} ranks; SIGKILL after step {kill_step}")
    begun = time.monotonic()
    with _launch(place, "train", overrides) as child:
        killed_step = next(s for s in _logged_steps(place, child) if s >= kill_step)
        child.kill()
    _say(f"killed all ranks after step {killed_step}; starting the same command again")
    relaunched = time.monotonic()
    with _launch(place, "resume", overrides) as child:
        steps = _logged_steps(place, child, skip_bytes=place.metrics.stat().st_size)
        resumed_step = next(steps)
        resume_s = time.monotonic() - relaunched
        _say(f"went on with step {resumed_step}, {resume_s:.1f} s after the start")
        _require_success(child, child.wait())
    metrics = read_metrics(place.metrics.read_text(encoding="utf-8").splitlines())
    return Training(metrics, killed_step, resumed_step, resume_s, time.monotonic() - begun)


def choose_kill_step(num_steps: int, steps_per_epoch: int, checkpoint_every: int) -> int:
    """The step (from 0) after which to kill: in mid-epoch, and not right behind a checkpoint.

    The first such step from KILL_AFTER of the run on. Where epochs are too short to have a middle,
    the first one behind a checkpoint; where the run is too short for that, the last but two.
    """
    lost = min(4, checkpoint_every // 2)
    first = max(checkpoint_every + lost, int(KILL_AFTER * num_steps))
    behind = [done for done in range(first, num_steps - 1) if done % checkpoint_every == lost]
    in_mid_epoch = [done for done in behind if 1 < done % steps_per_epoch < steps_per_epoch - 1]
    return next(iter(in_mid_epoch or behind), max(1, num_steps - 2)) - 1


def _launch(place: Place, name: str, overrides: Sequence[str]) -> Child:
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        *(sys.executable, str(launcher), "--num_accelerators", str(NUM_RANKS)),
        *("--master_addr", "127.0.0.1", "--master_port", str(_free_port())),
        *("--module", "trainer", "--config", CONFIG, *overrides),
    ]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{launcher.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    return Child(name, command, place.logs, environment)


def _overrides(place: Place, dataset: str, run: str, *, num_images: int) -> list[str]:
    """What the demo sets beside its configuration file.

    Another number of images than ours changes the epochs, so that the steps stay about the same,
    and fewer than a batch the batch.
    """
    placed = [
        f"loader.dataset={dataset}",
        f"checkpoint.run={run}",
        f"train.log_dir={place.metrics.parent}",
    ]
    config = load_config(Config, CONFIG, placed)
    batch = min(config.loader.global_batch, num_images // NUM_RANKS * NUM_RANKS)
    if batch == 0:
        raise DemoError(f"{num_images} readable images are too few for {NUM_RANKS} ranks")
    planned_images = config.train.epochs * PICTURES
    epochs = max(1, round(planned_images / num_images))
    return [*placed, f"loader.global_batch={batch}", f"train.epochs={epochs}"]


def _logged_steps(place: Place, child: Child, *, skip_bytes: int = 0) -> Iterator[int]:
    """Steps as the ranks log them. Raises DemoError when they end, or log nothing for STALL_S."""
    position, deadline = skip_bytes, time.monotonic() + STALL_S
    while True:
        ended = child.exit_code is not None  # looked at first: its last lines are there then
        lines = _lines_behind(place.metrics, position)
        for line in lines:
            position += len(line)
            yield from (row["step"] for row in read_metrics([line.decode()]).rows)
            deadline = time.monotonic() + STALL_S
        if ended and not lines:
            _fail(child, f"ended with exit code {child.exit_code} too early")
        if time.monotonic() > deadline:
            _fail(child, f"logged no step for {STALL_S:.0f} s")
        time.sleep(0.05)


def _lines_behind(path: Path, position: int) -> list[bytes]:
    """The complete lines of a file behind a position."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(position)
        return [line for line in file if line.endswith(b"\n")]


# The other stages


@contextmanager
def _serving(place: Place) -> Iterator[S3Server]:
    server = S3Server(place.store)
    try:
        server.start()
    except (OSError, RuntimeError) as error:  # TimeoutError is an OSError
        raise DemoError(f"the S3 server did not start: {error}") from None
    try:
        yield server
    finally:
        server.stop()


def _make_pictures(place: Place) -> Path:
    _say("cutting pictures from the photographs inside scikit-image and scikit-learn")
    write_pictures(place.pictures, PICTURES)
    return place.pictures


def _json_of(place: Place, name: str, module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module … --json` and return what it printed. Raises DemoError."""
    command = [sys.executable, "-m", module, *arguments, "--json"]
    with Child(name, command, place.logs, os.environ) as child:
        _require_success(child, child.wait())
        result: dict[str, Any] = json.loads(child.output)
        return result


def _evaluate(place: Place, dataset: str, run: str) -> dict[str, float]:
    """kNN accuracy (label = sub-folder, each image left out in turn) by trunk."""
    _say("evaluating by kNN, the trained trunk and a random one")
    options = ["--run", run, "--dataset", dataset, "--k", str(NEIGHBOURS), "--random-trunk"]
    found = _json_of(place, "knn", "trainer.evaluate", "knn", *options)
    return {trunk: found[trunk][str(NEIGHBOURS)] for trunk in ("trained", "random")}


def _require_success(child: Child, code: int) -> None:
    if code != 0:
        _fail(child, f"failed with exit code {code}")


def _fail(child: Child, what: str) -> NoReturn:
    raise DemoError(
        f"the stage {child.name!r} {what}; what it said stands above and in {child.log}. Put that "
        "right and run `make demo` again: it starts afresh and keeps the pictures."
    )


# What is shown


def summary(
    packed: dict[str, Any],
    verified: dict[str, Any],
    training: Training,
    knn: dict[str, float] | None,
    config: Config,
) -> list[tuple[str, str]]:
    """The rows of the table at the end."""
    rows = training.metrics.rows
    num_prototypes = config.model.num_prototypes
    peak = max(row["peak_rss_bytes"] for row in rows)
    lines = [
        ("images packed", f"{packed['packed']:,}, all verified ({verified['shards']} shard(s))"),
        ("rejected", _rejects(packed["rejected"])),
        ("packing", f"{packed['images_per_s']:,.0f} images/s"),
        ("training", f"{_median(rows, 'images_per_s'):,.0f} images/s, {NUM_RANKS} ranks"),
        ("loss at start", f"{_mean_loss(rows[:10]):.3f} (first 10 steps)"),
        ("loss at end", f"{_mean_loss(rows[-10:]):.3f} (last 10 of {len(rows)} steps)"),
        ("ln K", f"{math.log(num_prototypes):.3f} (chance, {num_prototypes} prototypes)"),
        (
            "killed by SIGKILL",
            f"after step {training.killed_step}, resumed at {training.resumed_step}",
        ),
        ("time to resume", f"{training.resume_s:.1f} s from the launch to the first new step"),
        ("steps lost", f"{training.steps_lost}, trained again"),
        ("peak memory", f"{peak / 1e9:.2f} GB of a training rank"),
    ]
    if knn:
        trained, untrained = f"{knn['trained']:.1%}", f"{knn['random']:.1%}"
        lines.append((f"kNN, k = {NEIGHBOURS}", f"{trained} (random trunk: {untrained})"))
    lines.append(("time", f"{_elapsed():.0f} s, {training.seconds:.0f} s of it training"))
    return lines


def _write_report(
    place: Place, rows: Sequence[tuple[str, str]], training: Training, config: Config
) -> None:
    curves = training_curves(training.metrics, num_prototypes=config.model.num_prototypes)
    write_report(
        place.report,
        title="cropstream: the demo run",
        notes=[
            f"A {config.model.backbone} pretrained by SwAV with {NUM_RANKS} ranks, streaming from "
            "an S3 server, killed with SIGKILL in mid-epoch and resumed from its checkpoint there."
        ],
        tables=[Table(title="Summary", rows=rows)],
        curves=[_with_kill(curves[0], training), *curves[1:]],
        crops=_draw_crops(config),
    )


def _with_kill(loss: Curve, training: Training) -> Curve:
    """One mark for the kill and the resume, which lie a few steps apart."""
    marks = [mark for mark in loss.marks if mark[1] != "resumed"]
    label = f"killed; resumed from step {training.resumed_step}"
    return replace(loss, marks=[*marks, (training.killed_step, label)])


def _draw_crops(config: Config) -> list[list[NDArray[np.uint8]]]:
    """The first batch's crops as the model saw them, image by image."""
    seed = config.train.seed
    with MultiCropLoader(config.loader, config.crops, config.augment, seed=seed) as loader:
        batch = next(iter(loader))
        return list(islice(_by_image(batch, config), NUM_CROP_ROWS))


def _by_image(batch: Batch, config: Config) -> Iterator[list[NDArray[np.uint8]]]:
    mean = torch.tensor(config.augment.mean).view(3, 1, 1)
    std = torch.tensor(config.augment.std).view(3, 1, 1)
    count = len(batch.samples)
    levels = [((crops * std + mean) * 255).round().clamp(0, 255).byte() for crops in batch.crops]
    pixels = [crops.permute(0, 2, 3, 1).contiguous().numpy() for crops in levels]
    for number in range(count):
        yield [crop for crops in pixels for crop in crops[number::count]]


def _rejects(counts: dict[str, int]) -> str:
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))
    return f"{sum(counts.values())}: {reasons}" if counts else "none"


def _mean_loss(rows: Sequence[dict[str, Any]]) -> float:
    return float(np.mean([row["loss"] for row in rows]))


def _median(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.median([row[name] for row in rows]))


def _aligned(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _say(what: str) -> None:
    over_a_bar = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{over_a_bar}[{_elapsed():5.1f} s] {what}", file=sys.stderr, flush=True)


def _elapsed() -> float:
    return time.monotonic() - _started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
