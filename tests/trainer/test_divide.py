"""A model that is divided over the ranks while it is built is never whole on one of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import run_ranks
from tests.support.trajectory import this_world
from trainer.engine import DeepSpeedEngine, EngineConfig, divide
from trainer.models import ModelConfig, SwAVModel, build_model
from trainer.optim import LARC, parameter_groups
from trainer.partitions import Fragment

WORLD_SIZE = 4
CONFIG = ModelConfig(
    backbone="resnet18", hidden_dim=3072, num_hidden_layers=10, feat_dim=64, num_prototypes=2000
)


def peak_bytes() -> int:
    """Of this process's own memory: ru_maxrss begins with that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [peak] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peak) * 1024


def engine_of(model: SwAVModel, stage: int) -> DeepSpeedEngine:
    groups = parameter_groups(model, exclude_bias_and_norm=True)
    optimizer = LARC(groups, lr=0.1, momentum=0.9, weight_decay=1e-6)
    return DeepSpeedEngine(model, optimizer, EngineConfig(zero_stage=stage))


def is_part_of(fragment: Fragment, model: SwAVModel) -> bool:
    whole = model.get_parameter(fragment.name).detach().view(-1)
    return torch.equal(fragment.weight, whole[fragment.start :][: len(fragment.weight)])


def observe() -> dict[str, Any]:
    this_world()
    torch.manual_seed(5)
    divide(torch.nn.Linear(2, 2))  # loads DeepSpeed
    before = peak_bytes()
    model = build_model(CONFIG, each=divide)
    divided = peak_bytes() - before
    engine = engine_of(model, 3)
    groups = [len(group["params"]) for group in parameter_groups(model, exclude_bias_and_norm=True)]
    torch.manual_seed(5)
    torch.nn.Linear(2, 2)  # draws as above
    whole = build_model(CONFIG)
    return {
        "growth": divided,
        "size": sum(p.numel() for p in whole.parameters()) * 4,
        "largest": max(p.numel() for p in whole.parameters()) * 4,
        "differs": [f.name for f in engine.fragments() if not is_part_of(f, whole)],
        "groups": groups,
        "whole_groups": [
            len(group["params"]) for group in parameter_groups(whole, exclude_bias_and_norm=True)
        ],
    }


@pytest.mark.dist
def test_a_rank_holds_its_share_and_a_layer_at_most():
    for found in run_ranks(observe, WORLD_SIZE):
        assert found["differs"] == []
        assert found["groups"] == found["whole_groups"]
        share = found["size"] / WORLD_SIZE
        assert share < found["growth"] < share + 3 * found["largest"] < 0.8 * found["size"]
