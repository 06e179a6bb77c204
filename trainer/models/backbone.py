"""What every trunk looks like from outside, and how its activations may be recomputed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from trainer.models.batchnorm import paused_statistics


class Backbone(nn.Module):
    """A convolutional trunk without a head.

    Attributes:
        feature_dim: channels of the last feature map, so the length of a pooled feature.
    """

    feature_dim: int

    def __init__(self) -> None:
        super().__init__()
        self._segments: list[tuple[int, ...]] = []

    def stem_features(self, images: Tensor) -> Tensor:
        """What the first stage is given, of `images` [N, 3, H, W]."""
        raise NotImplementedError

    def stages(self) -> Sequence[nn.Sequential]:
        """The stages, sequences of blocks, in their order."""
        raise NotImplementedError

    def initialize_convolution(self, convolution: nn.Conv2d) -> None:
        """Draw the weights a convolution begins with: He's, by fan-out, unless a trunk differs."""
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")

    def initialize(self) -> None:
        """Draw all convolutions' weights; other layers are constructed as they begin."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                self.initialize_convolution(module)

    def forward_features(self, images: Tensor) -> Tensor:
        """The last feature map, [N, feature_dim, h, w], of `images` [N, 3, H, W]."""
        x = self.stem_features(images)
        for number, stage in enumerate(self.stages()):
            x = self._run(stage, self._segments[number] if self._segments else (), x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Features averaged over the image, [N, feature_dim], of `images` [N, 3, H, W]."""
        return nn.functional.adaptive_avg_pool2d(self.forward_features(images), 1).flatten(1)

    def recompute(self, segment_ends: Sequence[Sequence[int]]) -> None:
        """Keep of some segments of blocks only their input, and compute the rest of it again.

        `segment_ends` has for every stage the numbers of blocks after which a segment ends, as
        SEER's recipes do: [9, 17] are two segments, blocks 0-8 and 9-16; what follows the last end
        is kept as always. Raises ValueError for ends that a stage does not have.
        """
        stages = self.stages()
        if segment_ends and len(segment_ends) != len(stages):
            raise ValueError(
                f"activation_checkpoints needs a list for each of the {len(stages)} stages, "
                f"got {len(segment_ends)}"
            )
        for number, (ends, stage) in enumerate(zip(segment_ends, stages, strict=False), start=1):
            if list(ends) != sorted({*ends}) or any(not 0 < end <= len(stage) for end in ends):
                raise ValueError(
                    f"activation_checkpoints of stage {number} must be increasing numbers from 1 "
                    f"to its {len(stage)} blocks, got {list(ends)}"
                )
        self._segments = [tuple(ends) for ends in segment_ends]

    def _run(self, stage: nn.Sequential, ends: Sequence[int], x: Tensor) -> Tensor:
        blocks, start = list(stage), 0
        if self.training and torch.is_grad_enabled():
            for end in ends:
                x = _recomputed(nn.Sequential(*blocks[start:end]), x)
                start = end
        for block in blocks[start:]:
            x = block(x)
        return x


def _recomputed(segment: nn.Sequential, x: Tensor) -> Tensor:
    """`segment(x)`, whose inner activations are computed again when gradients are.

    BatchNorm's running statistics are moved by the first pass only. The second runs to its end:
    ZeRO-3 releases weights, and ranks meet in BatchNorm, behind the last activation that is needed.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), paused_statistics(segment)

    with set_checkpoint_early_stop(False):
        output: Tensor = checkpoint(
            segment, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
    return output
