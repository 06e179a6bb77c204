"""RegNetY trunks with the shapes that SEER was trained with, up to ten billion parameters.

Radosavovic et al. 2020; SEER: Goyal et al. 2021 and 2022. Stage widths and depths are those which
VISSL's configurations give, written out, because the generating formula has several roundings: for
8gf torchvision's makes the first stage 224 wide instead of 168, and its builder cannot run on the
meta device. The blocks and the parameter names are torchvision's.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torchvision.models.regnet import AnyStage, ResBottleneckBlock, SimpleStemIN

from trainer.models.backbone import Backbone

STEM_WIDTH = 32
SE_RATIO = 0.25  # of a block's input width


class RegNetShape(NamedTuple):
    """The four stages; every width is a multiple of the group width."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    group_width: int


SHAPES = {
    "regnet_y_400mf": RegNetShape((48, 104, 208, 440), (1, 3, 6, 6), 8),
    "regnet_y_8gf": RegNetShape((168, 448, 896, 2016), (2, 4, 10, 1), 56),
    "regnet_y_16gf": RegNetShape((224, 448, 1232, 3024), (2, 4, 11, 1), 112),
    "regnet_y_32gf": RegNetShape((232, 696, 1392, 3712), (2, 5, 12, 1), 232),
    "regnet_y_64gf": RegNetShape((328, 984, 1968, 4920), (2, 5, 12, 1), 328),
    "regnet_y_128gf": RegNetShape((528, 1056, 2904, 7392), (2, 7, 17, 1), 264),
    "regnet_y_256gf": RegNetShape((746, 1492, 4103, 10444), (2, 7, 17, 1), 373),
    "regnet_y_10b": RegNetShape((2020, 4040, 11110, 28280), (2, 7, 17, 1), 1010),
}


class RegNet(Backbone):
    """A RegNetY: stem, then four stages that each halve the resolution."""

    def __init__(self, shape: RegNetShape) -> None:
        super().__init__()
        self.stem = SimpleStemIN(3, STEM_WIDTH, nn.BatchNorm2d, nn.ReLU)
        self.trunk_output = _stages(shape)
        self.feature_dim = shape.widths[-1]
        self.initialize()

    def stem_features(self, images: Tensor) -> Tensor:
        """See Backbone."""
        features: Tensor = self.stem(images)
        return features

    def stages(self) -> Sequence[nn.Sequential]:
        """See Backbone."""
        return [stage for stage in self.trunk_output if isinstance(stage, nn.Sequential)]

    def initialize_convolution(self, convolution: nn.Conv2d) -> None:
        """As ClassyVision, with which SEER was trained: fan-out without regard to groups."""
        fan_out = math.prod(convolution.kernel_size) * convolution.out_channels
        nn.init.normal_(convolution.weight, mean=0.0, std=math.sqrt(2.0 / fan_out))


def _stages(shape: RegNetShape) -> nn.Sequential:
    stages = OrderedDict[str, nn.Module]()
    width_in = STEM_WIDTH
    for number, (width, depth) in enumerate(zip(shape.widths, shape.depths, strict=True), start=1):
        stages[f"block{number}"] = AnyStage(
            width_in,
            width,
            stride=2,
            depth=depth,
            block_constructor=ResBottleneckBlock,
            norm_layer=nn.BatchNorm2d,
            activation_layer=nn.ReLU,
            group_width=shape.group_width,
            bottleneck_multiplier=1.0,
            se_ratio=SE_RATIO,
            stage_index=number,
        )
        width_in = width
    return nn.Sequential(stages)
