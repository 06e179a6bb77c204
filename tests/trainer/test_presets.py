"""Every preset of configs/ against the published recipes (tests/golden/recipes.json)."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import dump_config, load_config, parse_config
from tests.support.golden import document
from trainer.config import Config
from trainer.models import meta_model
from trainer.schedule import warmup_cosine

CONFIGS = Path(__file__).parents[2] / "configs"
PLACES = ["loader.dataset=s3://bucket/data", "checkpoint.run=s3://bucket/run"]
RECIPES = document("recipes")
SWAV, SEER = RECIPES["swav"], RECIPES["seer"]
OURS = {"demo", "fashion_mnist", "swav_rn50_1gpu"}  # no published recipe

scripts = pytest.mark.parametrize("row", SWAV["scripts"], ids=lambda row: row["preset"])
models = pytest.mark.parametrize("row", SEER["models"], ids=lambda row: row["preset"])


def preset(name: str, *overrides: str) -> Config:
    return load_config(Config, str(CONFIGS / f"{name}.toml"), [*PLACES, *overrides])


def header(name: str) -> str:
    text = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if line.startswith("#"))


def crops_of(config: Config) -> tuple[list[list[int]], list[list[float]]]:
    groups = config.crops.groups
    return [[g.count, g.size_px] for g in groups], [list(g.scale) for g in groups]


def steps_an_epoch(config: Config, num_images: int) -> int:
    return num_images // config.loader.global_batch


def learning_rates(config: Config, num_images: int) -> list[float]:
    """Of every hundredth step of a run, and of its first and last ones."""
    per_epoch = steps_an_epoch(config, num_images)
    total, schedule = config.train.epochs * per_epoch, config.schedule
    warmup = schedule.warmup_steps
    warmup = warmup if warmup >= 0 else schedule.warmup_epochs * per_epoch
    steps = sorted({*range(0, total, 100), max(warmup - 1, 0), warmup, total - 1})
    return [
        warmup_cosine(
            step,
            base_lr=schedule.base_lr,
            final_lr=schedule.final_lr,
            start_lr=schedule.start_lr,
            warmup_steps=warmup,
            total_steps=total,
        )
        for step in steps
    ]


def test_every_file_is_in_a_recipe_or_ours():
    published = {row["preset"] for row in (*SWAV["scripts"], *SEER["models"])}
    assert {path.stem for path in CONFIGS.glob("*.toml")} == published | OURS
    assert len(SWAV["scripts"]) == 9


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.toml")))
def test_every_preset_loads_and_its_header_says_what_it_is(name: str):
    config = preset(name)
    assert parse_config(Config, dump_config(config), where="printed") == config
    for word in ("Source", "Command", "Hardware", "Expected"):
        assert f"\n# {word}  " in header(name), word
    assert name in header(name) or name == "fashion_mnist", "the command names the file"


@scripts
def test_swav_batch_crops_and_length_are_the_scripts(row: dict[str, Any]):
    config = preset(row["preset"])
    assert config.loader.global_batch == row["gpus"] * row["images_per_gpu"]
    assert crops_of(config) == (row["crops"], row["crop_scales"])
    assert config.train.epochs == row["epochs"]
    assert f"scripts/{row['script']}" in header(row["preset"])
    assert f"top-1 {row['imagenet_linear_top1']}" in header(row["preset"])
    assert f"{row['gpus']} GPUs ({row['images_per_gpu']} images each" in header(row["preset"])


@scripts
def test_swav_model_and_codes_are_the_scripts(row: dict[str, Any]):
    config, common = preset(row["preset"]), SWAV["common"]
    model = config.model
    assert (model.backbone, model.hidden_dim) == (row["backbone"], row["hidden_dim"])
    assert (model.num_hidden_layers, model.head_batchnorm) == (1, True)
    assert (model.feat_dim, model.num_prototypes) == (common["feat_dim"], common["num_prototypes"])
    assert model.batchnorm_ranks == row["batchnorm_ranks"]
    assert config.sinkhorn.epsilon == common["epsilon"]
    assert config.sinkhorn.num_iterations == common["sinkhorn_iterations"]
    assert not config.sinkhorn.hard_codes
    assert config.loss.temperature == common["temperature"]
    assert list(config.loss.crops_for_assign) == common["crops_for_assign"]
    assert config.queue.length == row["queue_length"]
    if row["queue_length"]:
        assert config.queue.start_epoch == row["queue_start_epoch"]
        assert config.queue.start_step == -1
        assert config.queue.length % config.loader.global_batch == 0, "nothing of it is cut off"


@scripts
def test_swav_optimiser_and_schedule_are_the_scripts(row: dict[str, Any]):
    config, common = preset(row["preset"]), SWAV["common"]
    optim, schedule = config.optim, config.schedule
    assert (optim.weight_decay, optim.momentum) == (common["weight_decay"], common["momentum"])
    assert optim.trust_coefficient == common["trust_coefficient"]
    assert optim.clip == common["larc_clip"]
    assert optim.exclude_bias_and_norm == common["larc_excludes_bias_and_norm"]
    assert schedule.base_lr == row["base_lr"]
    assert schedule.final_lr == pytest.approx(row["base_lr"] * common["final_lr_share_of_base"])
    assert (schedule.warmup_epochs, schedule.warmup_steps) == (row["warmup_epochs"], -1)
    assert schedule.freeze_prototypes_steps == row["freeze_prototypes_iterations"]
    # In steps of ImageNet: prototypes are free after one epoch, whatever the batch.
    per_epoch = steps_an_epoch(config, RECIPES["imagenet_images"])
    assert schedule.freeze_prototypes_steps - per_epoch in range(2) or row["images_per_gpu"] == 40
    rates = learning_rates(config, RECIPES["imagenet_images"])
    assert max(rates) == row["base_lr"]
    if row["warmup_epochs"]:
        assert rates[0] == row["start_lr"]
    else:
        assert rates[0] == row["base_lr"]
    assert rates[-1] == pytest.approx(schedule.final_lr, rel=0.02)


@models
def test_seer_batch_rate_and_length_follow_the_published_rules(row: dict[str, Any]):
    config, common = preset(row["preset"]), SEER["common"]
    batch = config.loader.global_batch
    if "gpus" in row:
        assert batch == row["gpus"] * row["images_per_gpu"]
        assert f"{row['gpus']} GPUs" in header(row["preset"])
    else:
        assert batch == row["derived_global_batch"]
    assert config.train.epochs == common["passes"]
    assert config.optim.weight_decay == common["weight_decay"]
    assert config.schedule.base_lr == pytest.approx(batch * common["lr_of_256_images"] / 256)
    share = 1 if row.get("constant_lr") else common["final_lr_share_of_base"]
    assert config.schedule.final_lr == pytest.approx(config.schedule.base_lr * share)
    if "published_iteration" in row:  # the weights are of the end of one pass, or just before
        whole_pass = steps_an_epoch(config, common["images"])
        assert 0.98 * whole_pass < row["published_iteration"] <= whole_pass
    rates = learning_rates(config, common["images"])
    if row.get("constant_lr"):
        assert set(rates[100:]) == {config.schedule.base_lr}
    else:
        after = rates[rates.index(max(rates)) :]
        assert all(a >= b for a, b in pairwise(after))


@models
def test_seer_model_and_codes_are_the_published(row: dict[str, Any]):
    config, common = preset(row["preset"]), SEER["common"]
    model = config.model
    trunk, *hidden, feat_dim = row["head"]
    assert model.backbone == row["backbone"]
    assert [model.hidden_dim] * model.num_hidden_layers == hidden
    assert model.feat_dim == feat_dim == common["feat_dim"]
    assert model.head_batchnorm == row["head_batchnorm"]
    assert model.num_prototypes == common["num_prototypes"]
    assert config.sinkhorn.num_iterations == common["sinkhorn_iterations"]
    module = meta_model(model)
    assert module.backbone.feature_dim == trunk
    assert f"top-1 {row['imagenet_linear_top1']}" in header(row["preset"])
    assert f"fine-tuned {row['finetuned_top1']}" in header(row["preset"])
    if "warmup_iterations" in row:
        assert config.schedule.warmup_steps == row["warmup_iterations"]
    if "batchnorm_ranks" in row:
        assert model.batchnorm_ranks == row["batchnorm_ranks"]


@models
def test_seer_models_have_the_published_number_of_parameters(row: dict[str, Any]):
    """Trunk and head by the integers of regnet_params.json; prototypes are K x D."""
    rows = document("regnet_params")["rows"]
    golden = next(each for each in rows if each["name"] == row["golden_head"])
    head = next(each for each in golden["heads"] if each["dims"] == row["head"])
    assert head["use_bn"] == row["head_batchnorm"]
    module = meta_model(preset(row["preset"]).model)
    counted = sum(each.numel() for each in module.parameters())
    prototypes = SEER["common"]["num_prototypes"] * SEER["common"]["feat_dim"]
    assert counted == golden["trunk_params"] + head["head_params"] + prototypes


def test_seer_10b_is_vissls_file():
    [row] = [each for each in SEER["models"] if each["preset"] == "seer_regnety_10b"]
    config = preset("seer_regnety_10b")
    assert crops_of(config) == (row["crops"], row["crop_scales"])
    assert config.sinkhorn.epsilon == row["epsilon"]
    assert config.queue.length == row["queue_length"]
    assert (config.schedule.start_lr, config.schedule.base_lr) == (row["start_lr"], row["base_lr"])
    assert [list(ends) for ends in config.model.activation_checkpoints] == (
        row["activation_checkpoints"]
    )
    assert config.checkpoint.every_steps == row["checkpoint_iterations"]
    whole_pass = steps_an_epoch(config, SEER["common"]["images"])
    assert round(row["warmup_share"] * whole_pass) == config.schedule.warmup_steps
    images = row["published_iteration"] * config.loader.global_batch
    assert round(images / 1e6) == row["published_million_images"]


@pytest.mark.parametrize("name", [row["preset"] for row in SEER["models"]])
def test_what_is_not_confirmed_is_said(name: str):
    assert ("Not confirmed" in header(name)) == (name != "seer_regnety_10b")


def test_the_one_gpu_recipe_is_the_small_batch_one_in_parts():
    ours, theirs = preset("swav_rn50_1gpu"), preset("swav_rn50_bs256_200ep")
    assert ours.engine.accumulation_steps == 4
    assert preset("swav_rn50_1gpu", "engine.accumulation_steps=1") == theirs
    assert "ours, and not measured" in header("swav_rn50_1gpu")
