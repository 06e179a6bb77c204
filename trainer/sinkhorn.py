"""Sinkhorn-Knopp: turn the scores of a batch into codes that use all prototypes equally.

SwAV (Caron et al. 2020, section 3.1 and appendix A) projects exp(scores / epsilon) on the
transportation polytope: every prototype gets the same mass, every sample the mass one. Called once
per assigned crop by the training step.

Where we differ from the reference: everything happens on logarithms, in float64. exp(score /
epsilon) leaves float32 for epsilon below about 0.011 with cosine scores, and a prototype that no
sample likes sums to zero, 0 / 0; neither can happen here, and no value is ever looked at by the
host. Logarithms of some hundreds would cost float32 two of its seven digits, and the scores of a
batch are few.

Shapes: B samples of this rank, K prototypes.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SinkhornConfig:
    """Section `sinkhorn`: how sharp the codes are and how evenly they use the prototypes."""

    epsilon: Annotated[float, Gt(0)] = 0.05  # weight of the entropy; smaller means sharper codes
    num_iterations: Annotated[int, Ge(0)] = 3
    hard_codes: bool = False  # each sample to its best prototype alone; the paper's are soft


@torch.no_grad()
def sinkhorn(
    scores_BK: Tensor,
    *,
    epsilon: float,
    num_iterations: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Codes of this rank's samples, [B, K], balanced over the samples of all ranks of `group`.

    Args:
        scores_BK: feature · prototype, not divided by epsilon; every rank brings the same B. Codes
            have their dtype, but at least float32.
        epsilon: entropy weight, > 0.
        num_iterations: each makes prototypes equal, then samples sum to one. With 0 only the grand
            total is normalised (to the number of samples of all ranks), so rows do not sum to one.
        group: ranks whose samples are balanced together; None is this process alone.

    Two all_reduce of K numbers an iteration; no host synchronisation; no gradient.
    """
    with torch.autocast(scores_BK.device.type, enabled=False):
        log_codes_BK = scores_BK.double() / epsilon
        if num_iterations == 0:
            _normalize_total(log_codes_BK, group)
        for _ in range(num_iterations):
            log_codes_BK -= _logsumexp_over_ranks(log_codes_BK.logsumexp(dim=0), group)
            log_codes_BK -= log_codes_BK.logsumexp(dim=1, keepdim=True)
        return log_codes_BK.exp_().to(torch.promote_types(scores_BK.dtype, torch.float32))


def harden(codes: Tensor) -> Tensor:
    """Codes [..., K] with all of a sample's mass on its best prototype (SwAV, section 4.1)."""
    best = codes.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(codes).scatter_(-1, best, 1.0)


def _normalize_total(log_codes_BK: Tensor, group: dist.ProcessGroup | None) -> None:
    world_size = dist.get_world_size(group) if group is not None else 1
    total = _logsumexp_over_ranks(log_codes_BK.flatten().logsumexp(dim=0), group)
    log_codes_BK -= total - math.log(world_size * log_codes_BK.shape[0])


def _logsumexp_over_ranks(partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log Σ_ranks exp(partial), elementwise; relative to the largest, so that nothing overflows."""
    if group is None or dist.get_world_size(group) == 1:
        return partial
    largest = partial.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = (partial - largest).exp_()
    dist.all_reduce(total, group=group)
    return total.log_().add_(largest)
