from pathlib import Path

import pytest

from pipeline.config import dump_config, load_config, parse_config
from pipeline.errors import ConfigError
from trainer.config import Config

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
PLACES = ["loader.dataset=s3://bucket/data", "checkpoint.run=s3://bucket/run"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_and_its_header_says_what_it_is(path: Path):
    config = load_config(Config, str(path), PLACES)
    assert parse_config(Config, dump_config(config), where="printed") == config
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Source", "Command", "Hardware", "Expected"):
        assert any(line.startswith(f"# {word} ") for line in header), word


def test_there_are_presets():
    assert {"demo", "swav_rn50_bs256"} <= {path.stem for path in PRESETS}


def test_small_batch_preset_is_the_official_script():
    path = next(path for path in PRESETS if path.stem == "swav_rn50_bs256")
    config = load_config(Config, str(path), PLACES)
    assert (config.loader.global_batch, config.train.epochs) == (256, 400)
    assert (config.queue.length, config.queue.start_epoch) == (3840, 15)
    assert (config.schedule.base_lr, config.schedule.final_lr) == (0.6, 0.0006)
    assert config.schedule.freeze_prototypes_steps == 5005
    assert (config.model.num_prototypes, config.model.hidden_dim) == (3000, 2048)
    assert (config.sinkhorn.epsilon, config.sinkhorn.num_iterations) == (0.05, 3)
    assert (config.loss.temperature, config.optim.weight_decay) == (0.1, 1e-6)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.crops_for_assign=[0, 9]", "crops_for_assign"),
        ("model.backbone=resnet5", "no backbone 'resnet5'"),
        ("engine.zero_stage=3", "engine.zero_stage"),
        ("crops.global_scale=[1.0, 0.1]", "global_scale"),
        ("sinkhorn.epsilon=nan", "sinkhorn.epsilon"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(override: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load_config(Config, None, [*PLACES, override])
