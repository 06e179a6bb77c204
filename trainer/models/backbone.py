"""What every trunk looks like from outside."""

from torch import Tensor, nn


class Backbone(nn.Module):
    """A convolutional trunk without a head.

    Attributes:
        feature_dim: channels of the last feature map, so the length of a pooled feature.
    """

    feature_dim: int

    def forward_features(self, images: Tensor) -> Tensor:
        """The last feature map, [N, feature_dim, h, w], of `images` [N, 3, H, W]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Features averaged over the image, [N, feature_dim], of `images` [N, 3, H, W]."""
        return nn.functional.adaptive_avg_pool2d(self.forward_features(images), 1).flatten(1)
