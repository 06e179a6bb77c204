"""The swapped prediction loss: every crop predicts the codes of the assigned crops.

SwAV (Caron et al. 2020), equations 1, 2 and 6: cross-entropy between the code of one crop and the
softmax of the scores of another view of the same image, averaged over all (assigned crop, other
crop) pairs.

Shapes: V crops an image, B images, K prototypes, A assigned crops.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Section `loss`: the softmax's temperature and which crops are given codes."""

    temperature: Annotated[float, Gt(0)] = 0.1
    crops_for_assign: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        crops = self.crops_for_assign
        if not crops or min(crops) < 0 or len(set(crops)) != len(crops):
            raise ValueError(f"crops_for_assign must be distinct crop numbers from 0, got {crops}")


def swav_loss(
    scores: Tensor,
    codes: Tensor,
    *,
    num_crops: int,
    crops_for_assign: Sequence[int],
    temperature: float,
) -> Tensor:
    """The loss of this rank's images: a scalar, in float32 or, for float64 scores, in float64.

    Args:
        scores: [num_crops * B, K], crop-major (rows v*B … v*B+B-1 are crop v of the B images).
        codes: [len(crops_for_assign), B, K], rows summing to one; constants, they get no gradient.
        num_crops: V, at least 2.
        crops_for_assign: which crop each of `codes` belongs to.
        temperature: > 0, divides the scores.

    Raises ValueError when the shapes contradict each other.
    """
    _check(scores, codes, num_crops, crops_for_assign)
    with torch.autocast(scores.device.type, enabled=False):
        dtype = torch.promote_types(scores.dtype, torch.float32)
        scores_VBK = scores.to(dtype).reshape(num_crops, -1, scores.shape[1])
        log_probs_VBK = torch.log_softmax(scores_VBK / temperature, dim=-1)
        all_crops_BK = log_probs_VBK.sum(dim=0)
        # Cross-entropy is linear in log p: sum the other crops first, then meet the code once.
        losses = [
            -(code_BK.detach() * (all_crops_BK - log_probs_VBK[crop])).sum(dim=-1).mean()
            for crop, code_BK in zip(crops_for_assign, codes, strict=True)
        ]
        return torch.stack(losses).mean() / (num_crops - 1)


def _check(scores: Tensor, codes: Tensor, num_crops: int, crops: Sequence[int]) -> None:
    if num_crops < 2 or not crops or max(crops) >= num_crops:
        raise ValueError(f"{num_crops} crops with codes for crops {tuple(crops)}: nothing to swap")
    expected = (len(crops), scores.shape[0] // num_crops, scores.shape[1])
    if scores.shape[0] % num_crops or codes.shape != expected:
        raise ValueError(
            f"scores {tuple(scores.shape)} of {num_crops} crops need codes {expected}, "
            f"got {tuple(codes.shape)}"
        )
