"""The feature queue: features of past batches that join Sinkhorn when a batch has too few samples.

SwAV (Caron et al. 2020), section 4.1 "small batches": with 256 samples and 3000 prototypes an equal
partition means little, so some 15 past batches are scored with the current prototypes and balanced
together with the batch; their codes are thrown away. Every rank keeps the features of its own
samples.

As in the reference the queue takes part only once it is completely filled. The reference finds that
out by looking at the last row, which waits for the device; here the host counts the pushes.

Shapes: A assigned crops, B samples of this rank a step, L the length over all ranks, D feature
dimension.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    """Section `queue`: how many past samples take part in Sinkhorn, and from when on."""

    length: Annotated[int, Ge(0)] = 0  # samples per assigned crop over all ranks; 0: no queue
    start_epoch: Annotated[int, Ge(0)] = 0  # first epoch whose batches are queued
    start_step: Annotated[int, Ge(-1)] = -1  # first such step of the run; -1: use start_epoch


class FeatureQueue:
    """First in, first out, newest first.

    `length` counts samples over all ranks and is truncated to a multiple of `batch_size *
    world_size` (`batch_size` per rank). Truncated to 0 the queue is absent: it is never full, and
    pushing does nothing.

    Attributes:
        features: [A, L / world_size, D] of this rank, zeros where nothing was pushed yet; without
            gradient.
        num_pushes: batches pushed since the beginning.
    """

    def __init__(
        self,
        length: int,
        feat_dim: int,
        num_assign_crops: int,
        *,
        batch_size: int,
        world_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if min(feat_dim, num_assign_crops, batch_size, world_size) < 1 or length < 0:
            raise ValueError("a queue needs positive sizes and a length of at least 0")
        self.length = length - length % (batch_size * world_size)
        self.batch_size = batch_size
        self.num_pushes = 0
        shape = (num_assign_crops, self.length // world_size, feat_dim)
        self.features = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def is_full(self) -> bool:
        """Whether every row holds a pushed feature. Known to the host; the device is not asked."""
        rows = self.features.shape[1]
        return 0 < rows <= self.num_pushes * self.batch_size

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Put `features` [A, B, D] at the front, in their order, and drop the oldest B.

        Raises ValueError for another shape.
        """
        num_crops, rows, feat_dim = self.features.shape
        if features.shape != (num_crops, self.batch_size, feat_dim):
            raise ValueError(
                f"the queue takes features {(num_crops, self.batch_size, feat_dim)}, "
                f"got {tuple(features.shape)}"
            )
        if rows == 0:
            return
        newest = features.detach().to(self.features)
        self.features = torch.cat([newest, self.features[:, : rows - self.batch_size]], dim=1)
        self.num_pushes += 1

    def state_dict(self) -> dict[str, Any]:
        """This rank's features and the number of pushes. The tensor is shared, not copied."""
        return {"features": self.features, "num_pushes": self.num_pushes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of a queue of the same shape. Raises ValueError for another shape."""
        features = state["features"]
        if features.shape != self.features.shape:
            raise ValueError(
                f"the saved queue is {tuple(features.shape)}, this one {tuple(self.features.shape)}"
            )
        self.features = features.to(self.features, copy=True)
        self.num_pushes = int(state["num_pushes"])
