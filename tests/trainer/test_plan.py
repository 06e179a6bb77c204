"""The plan of a run: against engines that really hold what it says, and what the command tells."""

import gc
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.config import load_config
from pipeline.errors import ConfigError, UsageError
from tests.bench.usage import run_measured
from tests.support.launch import run_module
from tests.support.processes import run_ranks
from tests.support.trajectory import this_world
from trainer.config import Config
from trainer.engine import BUCKET_ELEMENTS, DeepSpeedEngine, divide
from trainer.models import build_model, meta_model
from trainer.optim import LARC, parameter_groups
from trainer.plan import Assumptions, Plan, RankMemory, load_plan_config, plan, to_text

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    *("model.backbone=regnet_y_400mf", "model.hidden_dim=64", "model.num_prototypes=30"),
    *("crops.global_size_px=64", "crops.local_crops=0", "loader.global_batch=8"),
    *("loader.dataset=data", "checkpoint.run=run"),
]
STAGES = [(0, "none"), *((stage, where) for stage in (1, 2, 3) for where in ("none", "cpu"))]


def planned(*arguments: str, path: Path | None = None, **assumed: float) -> Plan:
    config, world_size = load_plan_config(str(path) if path else None, arguments)
    return plan(config, world_size, Assumptions(**assumed))  # type: ignore[arg-type]


def configuration(stage: int, offload: str) -> Config:
    engine = [f"engine.zero_stage={stage}", f"engine.offload={offload}"]
    return load_config(Config, None, [*SMALL, *engine])


def held() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    storages: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attributes of torch that warn when they are looked at
        for each in _tensors():
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors() -> Iterator[torch.Tensor]:
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and each.device.type == "cpu":
            yield each
            if each.is_leaf and each.grad is not None:
                yield each.grad


def observe() -> dict[tuple[int, str], tuple[int, int]]:
    """On every rank: what engines of all stages hold, before and after the first backward pass."""
    this_world()
    found = {}
    for stage, offload in STAGES:
        config, before = configuration(stage, offload), held()
        model = build_model(config.model, each=divide if stage == 3 else None)
        optimizer = LARC(parameter_groups(model), lr=0.1, momentum=0.9, weight_decay=0.0)
        engine = DeepSpeedEngine(model, optimizer, config.engine)
        del model, optimizer
        at_rest = held() - before
        engine.backward(engine.forward([torch.randn(4, 3, 64, 64)])[1].square().mean())
        found[stage, offload] = at_rest, held() - before
        del engine
    return found


@pytest.fixture(scope="module")
def engines() -> list[dict[tuple[int, str], tuple[int, int]]]:
    return run_ranks(observe, 2)


@pytest.fixture(scope="module")
def small_plan() -> dict[tuple[int, str], RankMemory]:
    found = planned(*SMALL, "world_size=2")
    return {(each.zero_stage, each.offload): each for each in found.memory}


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "offload"), STAGES)
def test_an_engine_holds_what_was_planned(engines, small_plan, stage: int, offload: str):
    memory: RankMemory = small_plan[stage, offload]
    sizes = [each.nbytes for each in meta_model(configuration(0, "none").model).parameters()]
    state = memory.weights + memory.masters + memory.momentum + memory.host
    if stage == 3:  # gradients' places and the bucket are there from the beginning
        state += memory.gradients + 4 * BUCKET_ELEMENTS
    small = 200_000 + 2 * max(sizes) * (offload == "cpu")  # BatchNorm's statistics; staging buffers
    for rank in engines:
        at_rest, after_backward = rank[stage, offload]
        assert state <= at_rest < state + small
        assert at_rest <= after_backward < state + memory.gradients + max(sizes) + small


def test_ranks_hold_the_less_the_higher_the_stage():
    stages = planned(*SMALL, "world_size=8").memory
    state = {
        (each.zero_stage, each.offload): each.weights
        + each.masters
        + each.momentum
        + each.gradients
        for each in stages
    }
    whole = state[0, "none"] // 12  # bytes of a parameter: weight, momentum, gradient
    assert state[1, "none"] == pytest.approx(9 * whole, rel=1e-4)
    assert state[2, "none"] == pytest.approx(5.5 * whole, rel=1e-4)
    assert state[3, "none"] == pytest.approx(2 * whole, rel=1e-4)
    assert state[1, "cpu"] == pytest.approx(8 * whole, rel=1e-4)
    assert state[3, "cpu"] == pytest.approx(0.5 * whole, rel=1e-4)


def test_steps_in_parts_hold_less_and_compute_more():
    path = CONFIGS / "swav_rn50_1gpu.toml"
    parts = planned("world_size=1", path=path)
    whole = planned("world_size=1", "engine.accumulation_steps=1", path=path)
    assert (parts.batch_size, parts.images_at_once) == (256, 64)
    assert parts.memory[0].step < 0.3 * whole.memory[0].step
    assert whole.flops_per_rank_step == 256 * whole.flops_per_image
    share = 2 * 224**2 / (2 * 224**2 + 6 * 96**2) / 3  # global crops, forward only
    assert parts.flops_per_rank_step / whole.flops_per_rank_step == pytest.approx(
        1 + share, rel=0.01
    )


def test_time_length_and_checkpoint_are_arithmetic():
    found = planned(
        *SMALL, "world_size=2", "engine.precision=bf16", num_images=1000, utilisation=0.5
    )
    assert (found.steps_per_epoch, found.num_steps) == (125, 12_500)
    h100 = next(each for each in found.times if each.name == "H100")
    assert h100.step_s == pytest.approx(4 * found.flops_per_image / (989.4e12 * 0.5))
    assert h100.images_per_s == pytest.approx(8 / h100.step_s)
    assert found.checkpoint_bytes == pytest.approx(8 * found.num_parameters, rel=0.01)
    assert found.checkpoint_s == pytest.approx(found.checkpoint_bytes / 2 / 85e6)
    assert {"V100", "V100 PCIe"}.isdisjoint(each.name for each in found.times)  # they have no bf16


def test_a_queue_is_held_divided_and_saved_whole():
    alone = planned(*SMALL, "world_size=1", "queue.length=80")
    four = planned(*SMALL, "world_size=4", "queue.length=80")
    without = planned(*SMALL, "world_size=4")
    assert alone.memory[0].queue == 4 * four.memory[0].queue
    assert four.checkpoint_bytes - without.checkpoint_bytes == 2 * 80 * 128 * 4


def test_the_command_plans_the_largest_model_in_little_memory():
    """Ten billion parameters are 38 GB; the process stays a hundredth of what it plans."""
    command = (
        *("trainer", "--plan", "--config", "configs/seer_regnety_10b.toml", "world_size=496"),
        *("--images", "1000000000", "--json"),
    )
    result = run_module(*command)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["num_parameters"] == 9_628_923_288
    assert found["num_steps"] == 126_008
    assert [each["zero_stage"] for each in found["memory"]] == [0, 1, 1, 2, 2, 3, 3]
    by_stage = {each["zero_stage"]: each for each in found["memory"] if each["offload"] == "none"}
    assert by_stage[0]["device"] > by_stage[1]["device"] > by_stage[3]["device"]
    assert by_stage[0]["weights"] == by_stage[2]["weights"] == 4 * found["num_parameters"]
    assert by_stage[3]["weights"] < 100e6
    assert run_measured(sys.executable, "-m", *command).peak_bytes < 1.5e9


def test_the_table_says_what_is_configured_what_fits_and_what_is_assumed():
    text = to_text(
        planned("world_size=4", path=CONFIGS / "swav_rn50_bs256.toml", num_images=1281167)
    )
    marked = [line for line in text.splitlines() if line.startswith(">")]
    assert len(marked) == 1
    assert marked[0].split()[1:3] == ["0", "none"]
    assert marked[0].endswith("16 GiB")
    assert "5,004 steps an epoch, 2,001,600 in all" in text
    assert text.count("assumed") == 3


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["world_size=7"], UsageError, "multiple of 7"),
        (["world_size=0"], ConfigError, "world_size=8"),
        (["world_size=many"], ConfigError, "world_size=8"),
        (["engine.accumulation_steps=3"], UsageError, "accumulation_steps=3"),
        (["model.backbone=resnet5"], ConfigError, "resnet5"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(arguments, error, words):
    with pytest.raises(error, match=words):
        planned(*SMALL, *arguments)


@pytest.mark.parametrize("wrong", [{"utilisation": 0.0}, {"utilisation": 20}, {"num_images": -1}])
def test_assumptions_have_ranges(wrong):
    with pytest.raises(UsageError, match="--utilisation"):
        Assumptions(**wrong)


def test_world_size_is_for_plans_only():
    result = run_module("trainer", "world_size=4", *SMALL)
    assert result.returncode == 2
    assert "section.key=value" in result.stderr


def test_data_and_run_may_be_told_all_the_same(tmp_path: Path):
    config = tmp_path / "mix.toml"
    config.write_text('[loader]\nmix = [{dataset = "s3://a/b"}]\n[checkpoint]\nrun = "s3://a/r"\n')
    loaded, world_size = load_plan_config(str(config), ["train.epochs=3"])
    assert (loaded.loader.parts[0].dataset, loaded.checkpoint.run) == ("s3://a/b", "s3://a/r")
    assert (loaded.train.epochs, world_size) == (3, 1)
    with pytest.raises(ConfigError, match="no configuration file"):
        load_plan_config(str(tmp_path / "none.toml"), [])
