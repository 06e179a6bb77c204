"""ResNet trunks, plain and wide, with the parameter names of torchvision and of SwAV's checkpoints.

He et al. 2016, with the stride of a bottleneck on its 3x3 convolution ("v1.5"). The wide ones are
the reference's (facebookresearch/swav, src/resnet50.py): w2, w4 and w5 multiply every width, the
stem's included. torchvision's wide_resnet widens only the 3x3 convolutions and is another network.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from trainer.models.backbone import Backbone

_Block = type[BasicBlock] | type[Bottleneck]


class ResNet(Backbone):
    """A ResNet of four stages; stage i has `layers[i]` blocks and 2**i times the stem's width."""

    def __init__(self, block: _Block, layers: Sequence[int], stem_width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        width = stem_width * block.expansion
        self.layer1 = _stage(block, layers[0], stem_width, stem_width, stride=1)
        self.layer2 = _stage(block, layers[1], width, 2 * stem_width, stride=2)
        self.layer3 = _stage(block, layers[2], 2 * width, 4 * stem_width, stride=2)
        self.layer4 = _stage(block, layers[3], 4 * width, 8 * stem_width, stride=2)
        self.feature_dim = 8 * width
        self.initialize()

    def stem_features(self, images: Tensor) -> Tensor:
        """See Backbone."""
        features: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return features

    def stages(self) -> Sequence[nn.Sequential]:
        """See Backbone."""
        return self.layer1, self.layer2, self.layer3, self.layer4


def _stage(block: _Block, depth: int, width_in: int, width: int, *, stride: int) -> nn.Sequential:
    width_out = width * block.expansion
    shortcut = None
    if stride != 1 or width_in != width_out:
        shortcut = nn.Sequential(
            nn.Conv2d(width_in, width_out, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(width_out),
        )
    first = block(width_in, width, stride, shortcut)
    return nn.Sequential(first, *(block(width_out, width) for _ in range(1, depth)))


def resnet18() -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2))


def resnet101() -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3))


def resnet50(widen: int = 1) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), stem_width=64 * widen)
