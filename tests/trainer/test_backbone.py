"""Activation checkpointing of a trunk's stages, and first weights layer by layer."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import load_config
from pipeline.errors import ConfigError
from trainer.config import Config
from trainer.models import ModelConfig, build_backbone, build_model, meta_model

SEGMENTS = {
    "resnet18": [[1, 2], [2], [], [1]],
    "regnet_y_400mf": [[1], [3], [2, 6], []],
    "small": [[3, 6, 7]],
}


def run(name: str, segments: list[list[int]]) -> tuple[Tensor, dict[str, Tensor], int]:
    """Features, then gradients and buffers by name, and the bytes kept for the backward pass."""
    torch.manual_seed(0)
    trunk = build_backbone(name).double()
    trunk.recompute(segments)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = trunk(images)
    kept_bytes = sum(kept.values())
    features.square().mean().backward()
    state = {n: p.grad for n, p in trunk.named_parameters() if p.grad is not None}
    return features.detach(), state | dict(trunk.named_buffers()), kept_bytes


@pytest.mark.parametrize("name", SEGMENTS)
def test_recomputing_changes_neither_gradients_nor_statistics(name: str) -> None:
    features, state, kept_bytes = run(name, [])
    recomputed, same_state, fewer_bytes = run(name, SEGMENTS[name])
    assert torch.equal(features, recomputed)
    assert state.keys() == same_state.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, same_state[key], rtol=1e-12, atol=1e-14)
    assert fewer_bytes < 0.8 * kept_bytes


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[[1], [2]]", "a list for each of the 4 stages, got 2"),
        ("[[3], [], [], []]", "stage 1 must be increasing numbers from 1 to its 2 blocks"),
        ("[[], [], [2, 1], []]", "stage 3 must be increasing"),
        ("[[0], [], [], []]", "stage 1 must be"),
    ],
)
def test_segments_a_trunk_does_not_have_are_refused(value: str, words: str) -> None:
    overrides = ["model.backbone=resnet18", f"model.activation_checkpoints={value}"]
    with pytest.raises(ConfigError, match=words):
        load_config(Config, None, ["loader.dataset=x", "checkpoint.run=y", *overrides])


def test_first_weights_are_those_of_the_seed_and_each_layer_is_shown() -> None:
    config = ModelConfig(backbone="resnet18", hidden_dim=8, feat_dim=4, num_prototypes=6)
    shown: list[nn.Module] = []
    torch.manual_seed(3)
    model = build_model(config, each=shown.append)
    torch.manual_seed(3)
    again = build_model(config)
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert {id(p) for layer in shown for p in layer.parameters()} == {
        id(p) for p in model.parameters()
    }
    convolution = model.backbone.get_parameter("layer4.0.conv1.weight")
    assert abs(convolution.std().item() / (2 / (9 * 512)) ** 0.5 - 1) < 0.05
    assert model.get_parameter("projection_head.0.weight").abs().max() <= 512**-0.5
    assert model.get_buffer("backbone.bn1.running_var").eq(1).all()


def test_a_meta_model_takes_no_memory() -> None:
    config = ModelConfig(backbone="regnet_y_10b", hidden_dim=8192, num_hidden_layers=2)
    model = meta_model(config)
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.backbone.parameters()) == 9_323_934_872
