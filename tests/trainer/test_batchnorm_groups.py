"""BatchNorm over groups of ranks, and what a checkpoint keeps of their statistics."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.processes import run_ranks
from tests.support.trajectory import this_world
from trainer.models import ModelConfig, build_model
from trainer.models.batchnorm import average_statistics

CONFIG = {"backbone": "resnet18", "hidden_dim": 8, "feat_dim": 4, "num_prototypes": 6}
WORLD_SIZE = 4


def images_of(rank: int) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))


def after_one_batch(group: Any, ranks: range) -> tuple[Tensor, dict[str, Tensor]]:
    """Features and statistics after a batch of the images of some ranks."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**CONFIG), group).double()
    features, _ = model(torch.cat([images_of(rank) for rank in ranks]).double())
    statistics = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    return features.detach(), statistics


def observe() -> dict[str, Any]:
    world = this_world()
    found: dict[str, Any] = {}
    for num_ranks in (0, 1, 2, 4):
        group = world.group_of(num_ranks)
        found[f"{num_ranks} ranks"] = after_one_batch(group, range(world.rank, world.rank + 1))
    torch.manual_seed(0)
    model = build_model(ModelConfig(**CONFIG), world.group_of(2)).double()
    model(images_of(world.rank).double())
    average_statistics(model)
    found["averaged"] = {n: b.clone() for n, b in model.named_buffers()}
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(observe, WORLD_SIZE)


@pytest.mark.dist
@pytest.mark.parametrize(("num_ranks", "size"), [(0, 4), (1, 1), (2, 2), (4, 4)])
def test_a_group_normalises_like_one_rank_with_all_its_images(ranks, num_ranks, size):
    for rank, found in enumerate(ranks):
        first = rank - rank % size
        features, statistics = after_one_batch(None, range(first, first + size))
        mine = features[2 * (rank - first) :][:2]
        seen_features, seen_statistics = found[f"{num_ranks} ranks"]
        torch.testing.assert_close(seen_features, mine, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(seen_statistics, statistics, rtol=1e-9, atol=1e-11)


@pytest.mark.dist
def test_what_is_saved_is_the_mean_of_the_groups_and_the_same_on_all_ranks(ranks):
    statistics = [after_one_batch(None, range(first, first + 2))[1] for first in (0, 2)]
    for found in ranks:
        for name, buffer in found["averaged"].items():
            if not buffer.is_floating_point():
                assert torch.equal(buffer, torch.ones_like(buffer))
                continue
            assert torch.equal(buffer, ranks[0]["averaged"][name])
            mean = (statistics[0][name] + statistics[1][name]) / 2
            torch.testing.assert_close(buffer, mean, rtol=1e-9, atol=1e-11)
