"""`make chaos`: SIGKILL at random moments; what comes out must be what comes out undisturbed.

    python -m tests.chaos [--seed N] [--rounds N]

Writes build/chaos.json, rows like those of `make bench`; exit code 1 if one misses its target.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.manifest import read_snapshot
from pipeline.store import open_store
from tests.bench.rows import Row, merge, table
from tests.support.dataset import pictures
from tests.support.launch import (
    ROOT,
    environment,
    kill_group,
    read_metrics,
    start_deepspeed,
    wait_for,
)

RESULTS = Path("build/chaos.json")
IMAGES = 120
STEPS = 30
PACK = [sys.executable, "-m", "shard_tools", "pack"]
TRAIN = [
    *("loader.global_batch=8", "loader.lanes=4", "crops.global_size_px=32", "crops.local_crops=0"),
    *("model.backbone=resnet18", "model.hidden_dim=16", "model.feat_dim=8", "queue.length=16"),
    *("model.num_prototypes=6", "schedule.base_lr=0.1", "schedule.warmup_epochs=0"),
    *("engine.zero_stage=1", "train.log_every_steps=1", "checkpoint.every_steps=3"),
    "train.epochs=2",
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="packing jobs, and kills of a run")
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "in")
        rows = [*packing(folder, dice, arguments.rounds), *training(folder, dice, arguments.rounds)]
    merge(RESULTS, rows)
    print(table(rows))
    return int(any(row.ok is False for row in rows))


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    for number, body in enumerate(pictures(IMAGES)):
        (folder / f"{number:04d}.jpg").write_bytes(body)


def packing(folder: Path, dice: random.Random, rounds: int) -> Iterator[Row]:
    """Pack, killed again and again, until it gets through: the same shards every time."""
    expected, seconds = pack(folder, "calm", None)
    identical, kills = 0, 0
    for number in range(rounds):
        data = f"killed{number}"
        while True:
            shards, _ = pack(folder, data, dice.uniform(0.2, 1.0) * seconds)
            if shards is not None:
                break
            kills += 1
        identical += shards == expected
    note = f"share of {rounds} jobs, {kills} kills"
    yield Row("chaos.pack_identical", identical / rounds, "", target=">= 1", note=note)
    yield Row("chaos.pack_kills", kills, "", target=">= 1")


def pack(folder: Path, data: str, kill_after_s: float | None) -> tuple[list[bytes] | None, float]:
    """One attempt: the hashes of all shards, or None if it was killed first; and its seconds."""
    start = time.monotonic()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "shard_tools",
            "pack",
            f"{folder}/in",
            f"{folder}/{data}",
            "--shard-rows",
            "6",
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    try:
        code = process.wait(kill_after_s)
    except subprocess.TimeoutExpired:
        kill_group(process)
        return None, time.monotonic() - start
    assert code == 0, f"pack ended with {code}"
    snapshot = read_snapshot(open_store(f"{folder}/{data}"))
    assert snapshot.rows.sum() == IMAGES, "one row per input"
    return list(snapshot.tar_hash), time.monotonic() - start


def training(folder: Path, dice: random.Random, kills: int) -> Iterator[Row]:
    """Two ranks, killed at random steps and started again: the losses of the undisturbed run."""
    log = folder / "launcher.log"

    def start(name: str) -> subprocess.Popen[str]:
        places = [f"loader.dataset={folder}/calm", f"checkpoint.run={folder}/runs/{name}"]
        return start_deepspeed([*TRAIN, *places, f"train.log_dir={folder}/{name}"], log=log)

    def losses(name: str) -> dict[int, float]:
        lines = read_metrics(folder / name / "metrics.jsonl")
        return {line["step"]: line["loss"] for line in lines}

    assert start("whole").wait(600) == 0, log.read_text()[-4000:]
    expected = losses("whole")
    for step in sorted(dice.sample(range(3, STEPS - 3), kills)):
        process = start("cut")
        wait_for(process, lambda step=step: max(losses("cut"), default=-1) >= step, log=log)
        kill_group(process)
    assert start("cut").wait(600) == 0, log.read_text()[-4000:]
    found = losses("cut")
    assert found.keys() == expected.keys() == set(range(STEPS))
    worst = max(abs(found[step] - expected[step]) for step in expected)
    note = f"{STEPS} steps, {kills} kills of two ranks"
    yield Row("chaos.train_loss_difference", worst, "", target="<= 1e-6", note=note)


if __name__ == "__main__":
    sys.exit(main())
