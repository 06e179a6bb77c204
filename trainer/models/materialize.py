"""From a model without memory to one on a device, layer by layer.

A model of ten billion parameters is 37 GB of float32: built on the meta device first, it is given
memory and first weights one layer after the other, and each layer may be divided over the ranks
before the next one comes (trainer.engine.divide). All models begin so, whatever their size, that
the first weights are the same under every ZeRO stage and on every device: they are drawn on the
host, from torch's generator, in the order of the layers.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.models.heads import SwAVModel


def materialize(
    model: SwAVModel,
    device: torch.device | str,
    *,
    each: Callable[[nn.Module], None] | None = None,
) -> None:
    """Give a `model` on the meta device memory on `device` and the weights it begins with.

    `each` is called with every layer that has parameters, as soon as it has them.
    """
    for module in model.modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        module.to_empty(device="cpu", recurse=False)
        _initialize(model, module)
        module.to(device)
        if each is not None:
            each(module)


def _initialize(model: SwAVModel, layer: nn.Module) -> None:
    assert isinstance(layer, nn.Conv2d | nn.Linear | _BatchNorm), f"no rule for {type(layer)}"
    layer.reset_parameters()
    if isinstance(layer, nn.Conv2d):
        model.backbone.initialize_convolution(layer)
