"""An evaluation of a small data set in which one image is broken."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pipeline.errors import UsageError
from pipeline.fetch import FetchConfig
from pipeline.loader import LoaderConfig
from pipeline.store import open_store
from tests.support.dataset import pictures, write_dataset
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
