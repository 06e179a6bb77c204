"""The whole road as a user walks it: pack, train under the deepspeed launcher, SIGKILL, resume."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.augment import AugmentConfig
from pipeline.crops import CropsConfig
from pipeline.loader import LoaderConfig, MultiCropLoader
from pipeline.manifest import read_snapshot
from pipeline.shards import kept_rows, read_index
from pipeline.store import open_store
from tests.support.dataset import pictures
from tests.support.launch import (
    kill_group,
    read_metrics,
    run_module,
    start_deepspeed,
    wait_for,
)
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.dist

IMAGES, GLOBAL_BATCH, EPOCHS = 80, 8, 2
STEPS_PER_EPOCH = IMAGES // GLOBAL_BATCH
SETTINGS = [
    f"loader.global_batch={GLOBAL_BATCH}",
    "loader.lanes=4",
    "crops.global_size_px=32",
    "crops.local_size_px=16",
    "crops.local_crops=2",
    "model.backbone=resnet18",
    "model.hidden_dim=32",
    "model.feat_dim=16",
    "model.num_prototypes=12",
    "queue.length=16",
    "queue.start_step=6",
    "schedule.base_lr=0.6",
    "schedule.warmup_epochs=0",
    "schedule.freeze_prototypes_steps=3",
    "engine.zero_stage=1",
    "checkpoint.every_steps=6",
    f"train.epochs={EPOCHS}",
    "train.log_every_steps=1",
]


@pytest.fixture(scope="module")
def dataset(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """80 labelled pictures, packed by the command line into several shards on S3."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, body in enumerate(pictures(IMAGES)):
        target = folder / f"label{number % 4}" / f"{number:03d}.jpg"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(body)
    (folder / "label0" / "broken.jpg").write_bytes(pictures(1)[0][:200])
    url = "s3://cropstream/road/data"
    packed = run_module("shard_tools", "pack", str(folder), url, "--shard-rows", "25", "--json")
    assert packed.returncode == 0, packed.stderr
    return url


def train_arguments(dataset: str, name: str, logs: Path, *more: str) -> list[str]:
    places = [f"loader.dataset={dataset}", f"checkpoint.run=s3://cropstream/road/runs/{name}"]
    return [*SETTINGS, *places, f"train.log_dir={logs / name}", *more]


def losses(path: Path) -> dict[int, float]:
    """The last value logged for each step."""
    return {record["step"]: record["loss"] for record in read_metrics(path)}


def test_kill_and_resume_is_the_uninterrupted_run(dataset: str, tmp_path: Path) -> None:
    log = tmp_path / "launcher.log"
    whole = start_deepspeed(train_arguments(dataset, "whole", tmp_path), log=log)
    assert whole.wait(240) == 0, log.read_text()[-4000:]
    expected = losses(tmp_path / "whole" / "metrics.jsonl")
    assert sorted(expected) == list(range(EPOCHS * STEPS_PER_EPOCH))

    metrics = tmp_path / "cut" / "metrics.jsonl"
    arguments = train_arguments(dataset, "cut", tmp_path)
    cut = start_deepspeed(arguments, log=log)
    wait_for(cut, lambda: len(read_metrics(metrics)) >= 14, log=log)  # in mid-epoch, past a save
    kill_group(cut)
    before = len(read_metrics(metrics))
    assert before < EPOCHS * STEPS_PER_EPOCH

    resumed = start_deepspeed(arguments, log=log)
    assert resumed.wait(240) == 0, log.read_text()[-4000:]
    records = read_metrics(metrics)
    assert records[before]["step"] in (12, 18), "resumed from the newest checkpoint"
    seen = losses(metrics)
    assert sorted(seen) == sorted(expected)
    for step, loss in expected.items():
        assert abs(seen[step] - loss) < 1e-6, f"step {step}"
    assert any(record["queue_used"] for record in records)
    for record in records:
        waits = [record[f"wait_{part}_s"] for part in ("fetch", "decode", "handover")]
        assert sum(waits) == pytest.approx(record["data_wait_s"])
    assert sum(record.get("loader/fetch_bytes", 0) for record in records) > 0

    for command in ("ls", "verify"):
        result = run_module("trainer.checkpoint", command, "s3://cropstream/road/runs/cut")
        assert result.returncode == 0, result.stderr
    evaluated = run_module(
        *("trainer.evaluate", "knn", "--run", "s3://cropstream/road/runs/cut"),
        *("--dataset", dataset, "--k", "5", "--json", "--random-trunk"),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    report = json.loads(evaluated.stdout)
    assert report["step"] == EPOCHS * STEPS_PER_EPOCH
    assert 0 <= report["trained"]["5"] <= 1
    again = run_module("trainer", *arguments)
    assert again.returncode == 0, "a finished run has nothing left to do, in any world"
    assert len(read_metrics(metrics)) == len(records)


def loaders(dataset: str, world_size: int) -> list[MultiCropLoader]:
    return [
        MultiCropLoader(
            LoaderConfig(dataset=dataset, global_batch=GLOBAL_BATCH, lanes=4),
            CropsConfig(global_size_px=32, local_size_px=16, local_crops=2),
            AugmentConfig(),
            seed=31,
            rank=rank,
            world_size=world_size,
            epochs=2,
        )
        for rank in range(world_size)
    ]


def test_global_batches_are_those_of_any_world_and_an_epoch_is_the_manifest(dataset: str) -> None:
    alone = [batch.samples for batch in loaders(dataset, 1)[0]]
    pair = [[batch.samples for batch in loader] for loader in loaders(dataset, 2)]
    for step, samples in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([rank[step] for rank in pair]), samples)

    store = open_store(dataset)
    snapshot = read_snapshot(store)
    assert len(snapshot) > 1
    keys: list[str] = []
    for index in snapshot.index:
        keys += kept_rows(read_index(store.get(index), where=index), None)["key"].to_pylist()
    assert len(keys) == IMAGES
    for epoch in range(2):
        epoch_samples = alone[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]
        seen = {keys[number] for samples in epoch_samples for number in samples}
        assert seen == set(keys)


def told_once(text: str, *words: str) -> None:
    assert "Traceback" not in text, text
    assert text.count("error:") == 1, text
    for word in words:
        assert word in text, text


def test_mistakes_end_with_one_message(dataset: str, tmp_path: Path) -> None:
    """In one process; what the launcher adds is the next test's."""

    def fails(code: int, *more: str, env: dict[str, str] | None = None) -> str:
        arguments = train_arguments(dataset, "mistakes", tmp_path, *more)
        result = run_module("trainer", *arguments, env=env)
        assert result.returncode == code, result.stderr
        return result.stderr

    told_once(
        fails(2, "optim.momentun=0.9", "schedule.base_lr=-1", "nosuch.key=1"),
        "3 mistake(s)",
        "optim.momentun: unknown key; known here: momentum",
        "schedule.base_lr",
        "nosuch",
    )
    told_once(fails(1, "loader.dataset=s3://cropstream/nothing"), "s3://cropstream/nothing", "pack")
    told_once(fails(1, "loader.dataset=s3://no-such-bucket/x"), "no-such-bucket")
    told_once(fails(2, "loader.dataset=ftp://host/x"), "ftp://host/x")
    told_once(fails(2, "loader.lanes=3"), "loader.lanes=3", "divisor")
    told_once(
        fails(1, env={"AWS_SECRET_ACCESS_KEY": "wrong"}), "AWS_SECRET_ACCESS_KEY", "s3://cropstream"
    )


def test_mistakes_under_the_launcher_are_told_by_one_rank(dataset: str, tmp_path: Path) -> None:
    def fails(code: int, *more: str) -> str:
        log = tmp_path / f"{more[-1]}.log".replace("/", "_")
        arguments = train_arguments(dataset, "mistakes", tmp_path, *more)
        assert start_deepspeed(arguments, log=log).wait(240) == code, log.read_text()
        return log.read_text()

    told_once(fails(2, "loader.lanes=1"), "2 ranks does not divide the 1 lanes")
    told_once(fails(2, "queue.lenght=3"), "queue.lenght: unknown key")
