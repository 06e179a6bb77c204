"""Models by name, and the layout of the official SwAV checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt
from torch import Tensor, nn

from trainer.models.backbone import Backbone
from trainer.models.batchnorm import SyncBatchNorm, convert_sync_batchnorm
from trainer.models.heads import SwAVModel, projection_head
from trainer.models.materialize import materialize
from trainer.models.regnet import SHAPES, RegNet
from trainer.models.resnet import ResNet, resnet18, resnet50, resnet101
from trainer.models.small import SmallNet

__all__ = [
    "BACKBONES",
    "Backbone",
    "ModelConfig",
    "RegNet",
    "ResNet",
    "SwAVModel",
    "SyncBatchNorm",
    "build_backbone",
    "build_model",
    "convert_sync_batchnorm",
    "from_reference_keys",
    "load_reference_checkpoint",
    "meta_model",
    "projection_head",
    "to_reference_keys",
]

BACKBONES: Mapping[str, Callable[[], Backbone]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet50w2": partial(resnet50, widen=2),
    "resnet50w4": partial(resnet50, widen=4),
    "resnet50w5": partial(resnet50, widen=5),
    **{name: partial(RegNet, shape) for name, shape in SHAPES.items()},
    "small": SmallNet,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Section `model`. The defaults are SwAV's ResNet-50."""

    backbone: str = "resnet50"
    hidden_dim: Annotated[int, Ge(0)] = 2048  # 0: the projection head is one linear layer
    num_hidden_layers: Annotated[int, Gt(0)] = 1  # SEER has 2
    head_batchnorm: bool = True
    feat_dim: Annotated[int, Gt(0)] = 128
    num_prototypes: Annotated[int, Gt(0)] = 3000
    batchnorm_ranks: Annotated[int, Ge(0)] = 0  # that share statistics; 0: all, 1: each its own
    # Where segments of a stage's blocks end that are computed again in the backward pass, as in
    # SEER: [[2], [7], [9, 17], []] is two segments in stage 3 and none in stage 4. Empty: none.
    activation_checkpoints: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.backbone)
        if self.activation_checkpoints:  # each kind of trunk knows its own stages
            build_backbone(self.backbone, device="meta").recompute(self.activation_checkpoints)


def build_backbone(name: str, *, device: torch.device | str | None = None) -> Backbone:
    """A freshly initialised trunk by its name (`BACKBONES` lists them), without a head.

    On the "meta" device even the largest takes no memory. Raises ValueError for an unknown name.
    """
    _check_name(name)
    with torch.device(device if device is not None else torch.get_default_device()):
        return BACKBONES[name]()


def meta_model(config: ModelConfig, group: dist.ProcessGroup | None = None) -> SwAVModel:
    """The model of a configuration on the meta device: shapes without memory.

    Ranks of `group` share BatchNorm's statistics, if there is one.
    """
    with torch.device("meta"):
        model = SwAVModel(
            build_backbone(config.backbone),
            config.hidden_dim,
            config.feat_dim,
            config.num_prototypes,
            num_hidden_layers=config.num_hidden_layers,
            head_batchnorm=config.head_batchnorm,
        )
        if group is not None:
            convert_sync_batchnorm(model, group)
    model.backbone.recompute(config.activation_checkpoints)
    return model


def build_model(
    config: ModelConfig,
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str = "cpu",
    each: Callable[[nn.Module], None] | None = None,
) -> SwAVModel:
    """The model of a configuration with the weights it begins with, drawn from torch's generator.

    `group` as in `meta_model`; `each` is called with every layer as soon as it has its weights.
    """
    model = meta_model(config, group)
    materialize(model, device, each=each)
    return model


def _check_name(name: str) -> None:
    if name not in BACKBONES:
        raise ValueError(f"no backbone {name!r}; there are {', '.join(BACKBONES)}")


_HEADS = ("projection_head.", "prototypes.")


def from_reference_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's state_dict with a SwAVModel's keys.

    The reference has the trunk's parameters at the top, beside `projection_head` and `prototypes`,
    and in saved files `module.` in front of everything.
    """
    plain = {key.removeprefix("module."): value for key, value in state_dict.items()}
    return {k if k.startswith(_HEADS) else f"backbone.{k}": v for k, v in plain.items()}


def to_reference_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A SwAVModel's state_dict with the reference's keys (without `module.`), in the same order."""
    return {key.removeprefix("backbone."): value for key, value in state_dict.items()}


def load_reference_checkpoint(model: SwAVModel, checkpoint: str | Path | Mapping[str, Any]) -> None:
    """Load an official SwAV checkpoint into `model`, strictly: every tensor must fit.

    `checkpoint` is a file (read without executing pickled code) or its content: a training
    checkpoint with its `state_dict`, or a bare state_dict as the published weights are. Raises
    RuntimeError naming what does not fit.
    """
    if isinstance(checkpoint, str | Path):
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
    assert isinstance(checkpoint, Mapping)
    model.load_state_dict(from_reference_keys(checkpoint.get("state_dict", checkpoint)))
