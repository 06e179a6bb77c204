"""An evaluation of a small data set in which one image is broken."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import UsageError
from pipeline.fetch import FetchConfig
from pipeline.loader import LoaderConfig
from pipeline.store import open_store
from tests.support.dataset import pictures, write_dataset
from tests.support.launch import run_module
from trainer.checkpoint import CheckpointConfig
from trainer.config import Config
from trainer.evaluate.evaluation import Evaluation
from trainer.fragments import Checkpoint
from trainer.models import ModelConfig


def evaluation(
    dataset: str, *, fetch: FetchConfig | None = None, quarantine: Sequence[dict[str, str]] = ()
) -> Evaluation:
    """Of a random trunk, which needs no weights of its checkpoint."""
    config = Config(
        loader=LoaderConfig(dataset=dataset),
        fetch=fetch or FetchConfig(),
        checkpoint=CheckpointConfig(run="run"),
        model=ModelConfig(backbone="resnet18", hidden_dim=8, feat_dim=4, num_prototypes=3),
    )
    checkpoint = Checkpoint(0, "", 1, "", (), {}, None, {"quarantine": list(quarantine)})
    return Evaluation("run", checkpoint, config, 32, 8, torch.device("cpu"))


def test_images_left_out_are_counted_and_a_bank_can_be_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = str(tmp_path)
    images = pictures(12)
    images[5] = images[5][:100]
    write_dataset(dataset, images, labels=["one", "other"] * 6)
    arguments = {"trained": False, "temperature": 0.07}

    accuracy = evaluation(dataset).knn(dataset, None, neighbours=[1, 11], **arguments)
    assert accuracy.keys() == {1}
    left_out = f"1 of 12 images of {dataset} could not be used and are left out\n"
    assert left_out in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"no --k of 11, 20 .* has 11 that can be used"):
        evaluation(dataset).knn(dataset, None, neighbours=[11, 20], **arguments)


def test_the_runs_way_of_reading_and_its_quarantine_are_used(tmp_path: Path) -> None:
    dataset, cache = str(tmp_path / "data"), tmp_path / "cache"
    keys = write_dataset(dataset, pictures(12))
    fetch = FetchConfig(cache_dir=str(cache), cache_bytes=10**7)
    shard = open_store(dataset).url_of("data/00/000000.tar")
    deadly = {"shard": shard, "key": keys[7], "reason": "decoder hung for 60 s"}
    found = evaluation(dataset, fetch=fetch, quarantine=[deadly]).features(dataset, trained=False)
    assert found.samples == [number for number in range(12) if number != 7]
    assert list(cache.glob("??/*"))


def shades(count: int, *, seed: int) -> tuple[list[bytes], list[str]]:
    """Noisy pictures, dark ones and bright ones in turn, and what each is."""
    rng = np.random.default_rng(seed)
    names = ["dark", "bright"] * (count // 2)
    encoded = []
    for name in names:
        low = 20 if name == "dark" else 180
        body = io.BytesIO()
        Image.fromarray(rng.integers(low, low + 50, (32, 32, 3), dtype=np.uint8)).save(body, "PNG")
        encoded.append(body.getvalue())
    return encoded, names


def test_a_linear_probe_of_a_run_by_its_command(tmp_path: Path) -> None:
    bank, test = str(tmp_path / "bank"), str(tmp_path / "test")
    for number, (dataset, count) in enumerate([(bank, 40), (test, 20)]):
        images, labels = shades(count, seed=number)
        write_dataset(dataset, images, labels=labels)
    run = str(tmp_path / "run")
    trained = run_module(
        *("trainer", f"loader.dataset={bank}", f"checkpoint.run={run}", "train.epochs=1"),
        *(f"train.log_dir={tmp_path / 'logs'}", "loader.global_batch=8", "model.backbone=small"),
        *("crops.global_size_px=16", "crops.local_crops=0", "model.num_prototypes=6"),
        *("schedule.warmup_epochs=0", "schedule.base_lr=0.1"),
    )
    assert trained.returncode == 0, trained.stderr
    options = ["--run", run, "--dataset", test, "--random-trunk", "--whole"]
    missing = run_module("trainer.evaluate", "linear", *options)
    assert missing.returncode == 2
    assert "the following arguments are required: --bank" in missing.stderr

    found = run_module("trainer.evaluate", "linear", *options, "--bank", bank, "--json")
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    assert answer["step"] == 5
    assert answer["trained"]["accuracy"] == answer["random"]["accuracy"] == 1.0
    told = run_module("trainer.evaluate", "linear", *options, "--bank", bank)
    assert told.stdout.startswith("linear probe, top-1 accuracy after 5 steps\n trained    100.0%")
