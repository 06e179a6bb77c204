import pytest

from pipeline.config import load_config
from pipeline.errors import ConfigError
from trainer.config import Config

PLACES = ["loader.dataset=s3://bucket/data", "checkpoint.run=s3://bucket/run"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.crops_for_assign=[0, 9]", "crops_for_assign"),
        ("model.backbone=resnet5", "no backbone 'resnet5'"),
        ("engine.zero_stage=4", "engine.zero_stage"),
        ("engine.round_robin_gradients=true", "LARC would scale"),
        ("engine.offload=cpu", "zero_stage 1, 2 or 3"),
        ("crops.global_scale=[1.0, 0.1]", "global_scale"),
        ("sinkhorn.epsilon=nan", "sinkhorn.epsilon"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(override: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load_config(Config, None, [*PLACES, override])
