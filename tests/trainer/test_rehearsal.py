"""The rehearsal on fake tensors against real steps of a small model."""

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import load_config
from trainer.config import Config
from trainer.models import build_model, meta_model
from trainer.rehearsal import Ledger, Rehearsal, rehearse

BATCH_SIZE = 16
SMALL = [
    *("loader.dataset=data", "checkpoint.run=run", "model.backbone=resnet18"),
    *("crops.global_size_px=64", "crops.local_size_px=32", "crops.local_crops=2"),
    *("model.hidden_dim=256", "model.num_prototypes=100"),
]
CHECKPOINTS = "model.activation_checkpoints=[[1], [2], [], [1, 2]]"


def configuration(*more: str) -> Config:
    return load_config(Config, None, [*SMALL, *more])


def rehearsed(config: Config) -> Rehearsal:
    return rehearse(config, batch_size=BATCH_SIZE, num_scored=BATCH_SIZE)


def pixels(config: Config) -> list[Tensor]:
    return [
        torch.randn(each.count * BATCH_SIZE, 3, each.size_px, each.size_px)
        for each in config.crops.groups
    ]


def forward(module: nn.Module, images: Sequence[Tensor], precision: str) -> Tensor:
    half = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    with half if precision == "bf16" else nullcontext():
        _, scores_NK = module(images)
    return scores_NK


def saved_bytes(config: Config) -> int:
    """What autograd really keeps for the backward pass, told by autograd itself."""
    module, images, found = build_model(config.model), pixels(config), {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scores_NK = forward(module, images, config.engine.precision)
    assert scores_NK.requires_grad
    for other in (*module.parameters(), *module.buffers(), *images):
        found.pop(other.untyped_storage().data_ptr(), None)
    return sum(found.values())


@pytest.mark.parametrize(
    "settings",
    [["engine.precision=fp32"], ["engine.precision=bf16"], ["engine.precision=bf16", CHECKPOINTS]],
)
def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps(settings: list[str]):
    config = configuration(*settings)
    assert rehearsed(config).after_forward == pytest.approx(saved_bytes(config), rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_that_of_a_real_step(precision: str):
    config = configuration(f"engine.precision={precision}")
    module, images = build_model(config.model), pixels(config)
    with Ledger(module) as ledger:
        forward(module, images, precision).logsumexp(1).mean().backward()
    found = rehearsed(config)
    assert found.peak == pytest.approx(ledger.peak, rel=0.01)
    assert found.peak_keeping == pytest.approx(ledger.peak_keeping, rel=0.01)


def test_nothing_is_left_of_a_real_step_but_its_loss():
    config = configuration()
    module, images = build_model(config.model), pixels(config)
    with Ledger(module) as ledger:
        loss = forward(module, images, "fp32").mean()
        loss.backward()
        assert ledger.live <= 2048, "no activation and no gradient outlives the step"
    assert all(each.grad is None for each in module.parameters())


def test_recomputation_saves_memory_and_costs_a_forward_pass_of_its_segments():
    config = configuration("engine.precision=bf16")
    plain, saving = (
        rehearsed(config),
        rehearsed(configuration("engine.precision=bf16", CHECKPOINTS)),
    )
    assert saving.after_forward < 0.8 * plain.after_forward
    assert saving.peak < plain.peak
    assert plain.recomputed_flops == 0
    everything = rehearsed(configuration("model.activation_checkpoints=[[2], [2], [2], [2]]"))
    assert 0 < saving.recomputed_flops < everything.recomputed_flops


def test_gradients_of_the_first_resolution_wait_for_the_second():
    """A weight's gradient is complete when both have come: a model's worth waits till then."""
    precision = "engine.precision=fp32"
    whole = sum(each.nbytes for each in meta_model(configuration().model).parameters())
    tiny = ["crops.global_size_px=32", "crops.local_size_px=16"]  # gradients are what is large
    both = rehearse(configuration(precision, *tiny), batch_size=2, num_scored=2)
    one = rehearse(
        configuration(precision, *tiny, "crops.local_crops=0"), batch_size=2, num_scored=2
    )
    assert both.peak - one.peak > 0.5 * whole


def test_weights_are_cast_for_every_resolution():
    plain = configuration("engine.precision=bf16")
    half = sum(each.nbytes for each in meta_model(plain.model).parameters()) / 2
    one_resolution = configuration("engine.precision=bf16", "crops.local_crops=0")
    assert rehearsed(one_resolution).casts == pytest.approx(half, rel=0.02)
    assert rehearsed(plain).casts == pytest.approx(2 * half, rel=0.03)  # the head has one
    assert rehearsed(configuration("engine.precision=fp32")).casts == 0
