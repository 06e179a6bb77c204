"""A small residual trunk for images of 28 to 64 pixels, where a ResNet's stem throws too much away.

He et al. 2016 (section 4.2, the CIFAR networks) in shape: 3x3 convolutions from the first pixel on,
basic blocks, a mean over the last map. Wider and shallower than theirs, with a last convolution to
512 channels, so that a linear probe has something to choose from: 1.05 million parameters, of which
0.59 in that convolution. configs/fashion_mnist.toml trains it.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from trainer.models.backbone import Backbone


class SmallNet(Backbone):
    """Strides 1, 2, 2, 2: an image of 28 pixels ends as a map of 4x4, one of 16 as 2x2."""

    feature_dim = 512

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(3, 32, stride=1),
            *_convolution(32, 64, stride=2),
            BasicBlock(64, 64),
            *_convolution(64, 128, stride=2),
            BasicBlock(128, 128),
            *_convolution(128, self.feature_dim, stride=2),
        )
        self.initialize()

    def stem_features(self, images: Tensor) -> Tensor:
        """See Backbone. The first stage begins with the pixels."""
        return images

    def stages(self) -> Sequence[nn.Sequential]:
        """See Backbone. One, whose blocks are single layers too."""
        return (self.layers,)


def _convolution(width_in: int, width: int, *, stride: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(width_in, width, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )
