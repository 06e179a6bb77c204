"""trainer.models.small: the trunk of the recipe that learns on two CPU cores."""

import torch

from trainer.models import build_backbone


def test_the_small_trunk_has_the_shape_of_its_recipe() -> None:
    trunk = build_backbone("small").eval()
    num_params = sum(parameter.numel() for parameter in trunk.parameters())
    assert num_params == 1_053_728
    for size_px, map_px in ((28, 4), (16, 2), (64, 8)):
        images = torch.randn(2, 3, size_px, size_px)
        assert trunk.forward_features(images).shape == (2, 512, map_px, map_px)
        assert trunk(images).shape == (2, trunk.feature_dim)
