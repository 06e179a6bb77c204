"""The projection head, the prototypes, and the model that joins them to a trunk.

SwAV (Caron et al. 2020): a trunk's pooled feature goes through a small MLP, is scaled to length
one, and is compared with the prototypes, one unit vector a cluster, by a linear layer without bias.

Shapes: N rows (all crops of all images, crop-major), D feature dimension, K prototypes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

import torch
from torch import Tensor, nn

from trainer.models.backbone import Backbone


def projection_head(
    in_dim: int,
    hidden_dim: int,
    out_dim: int,
    *,
    num_hidden_layers: int = 1,
    batchnorm: bool = True,
) -> nn.Module:
    """Linear, BatchNorm, ReLU for every hidden layer, then Linear.

    SwAV has one hidden layer, SEER two; SEER's large models leave BatchNorm out. With `hidden_dim`
    0 it is a single Linear. Parameter names are the reference's.
    """
    if hidden_dim == 0:
        return nn.Linear(in_dim, out_dim)
    layers: list[nn.Module] = []
    for _ in range(num_hidden_layers):
        layers.append(nn.Linear(in_dim, hidden_dim))
        if batchnorm:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.ReLU(inplace=True))
        in_dim = hidden_dim
    return nn.Sequential(*layers, nn.Linear(in_dim, out_dim))


class SwAVModel(nn.Module):
    """Trunk, projection head, prototypes.

    `backbone` maps [n, 3, H, W] to [n, feature_dim] and says its `feature_dim`.
    """

    def __init__(
        self,
        backbone: Backbone,
        hidden_dim: int,
        feat_dim: int,
        num_prototypes: int,
        *,
        num_hidden_layers: int = 1,
        head_batchnorm: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = projection_head(
            backbone.feature_dim,
            hidden_dim,
            feat_dim,
            num_hidden_layers=num_hidden_layers,
            batchnorm=head_batchnorm,
        )
        self.prototypes = nn.Linear(feat_dim, num_prototypes, bias=False)

    def forward(self, crops: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """L2-normalised features [N, D] and scores [N, K], both float32 (float64 stays float64).

        Args:
            crops: one tensor [n, 3, s, s], or several. Neighbours of the same resolution go through
                the trunk together, so trunk BatchNorm sees one resolution at a time; the head sees
                all rows at once.
        """
        groups = _by_resolution([crops] if isinstance(crops, Tensor) else crops)
        pooled = _concatenate([self.backbone(images) for images in groups])
        projected = self.projection_head(pooled)
        with _no_autocast(projected.device):
            dtype = torch.promote_types(projected.dtype, torch.float32)
            features_ND = nn.functional.normalize(projected.to(dtype), dim=1)
            return features_ND, self.prototypes(features_ND)


def _by_resolution(crops: Sequence[Tensor]) -> list[Tensor]:
    runs = groupby(crops, key=lambda images: images.shape[-2:])
    return [_concatenate(list(run)) for _, run in runs]


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    if device.type == "meta":  # knows no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
