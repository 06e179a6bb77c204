"""torch.compile of the trunk, which needs a C++ compiler on CPUs and a minute."""

import shutil

import pytest
import torch

from trainer.engine import EngineConfig, _compute_in
from trainer.models import ModelConfig, SwAVModel, build_model

CONFIG = ModelConfig(backbone="resnet18", hidden_dim=16, feat_dim=8, num_prototypes=6)


def model_of(*, compiles: bool) -> SwAVModel:
    torch.manual_seed(0)
    model = build_model(CONFIG)
    _compute_in(model, EngineConfig(compile=compiles), torch.device("cpu"))
    return model


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_trunk_gives_the_same_features_and_gradients() -> None:
    crops = [torch.randn(4, 3, 64, 64), torch.randn(4, 3, 32, 32)]
    results = []
    for compiles in (False, True):
        model = model_of(compiles=compiles)
        features, scores = model(crops)
        scores.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((features.detach(), gradients, dict(model.named_buffers())))
    (features, gradients, buffers), (compiled, same_gradients, same_buffers) = results
    torch.testing.assert_close(features, compiled, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, same_gradients[name], rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(buffers, same_buffers, rtol=1e-3, atol=1e-4)
