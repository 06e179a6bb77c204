"""An evaluation of a small data set in which one image is broken."""

from pathlib import Path

import pytest
import torch

from pipeline.errors import UsageError
from pipeline.loader import LoaderConfig
from tests.support.dataset import pictures, write_dataset
from trainer.checkpoint import CheckpointConfig
from trainer.config import Config
from trainer.evaluate.evaluation import Evaluation
from trainer.fragments import Checkpoint
from trainer.models import ModelConfig


def evaluation(dataset: str) -> Evaluation:
    """Of a random trunk, which needs nothing of its checkpoint."""
    config = Config(
        loader=LoaderConfig(dataset=dataset),
        checkpoint=CheckpointConfig(run="run"),
        model=ModelConfig(backbone="resnet18", hidden_dim=8, feat_dim=4, num_prototypes=3),
    )
    nothing = Checkpoint(0, "", 1, "", (), {}, None, {})
    return Evaluation("run", nothing, config, 32, 8, torch.device("cpu"))


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
