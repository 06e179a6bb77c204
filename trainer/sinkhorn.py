"""Sinkhorn-Knopp: turn the scores of a batch into codes that use all prototypes equally.

SwAV (Caron et al. 2020, section 3.1 and appendix A) projects exp(scores / epsilon) on the
transportation polytope: every prototype gets the same mass, every sample the mass one. Called once
per assigned crop by the training step.

Where we differ from the reference: exp(score / epsilon) leaves float32 for epsilon below about
0.011 with cosine scores, and a prototype that no sample likes sums to zero, 0 / 0. Neither can
happen here, and no value is ever looked at by the host. There are two ways, which agree to 1e-11:

    scores of any size       everything happens on logarithms, in float64. (Logarithms of some
                             hundreds would cost float32 two of its seven digits.)
    scores within a `bound`  whose exponentials float64 holds: they are taken once, and an iteration
                             is two products of the matrix with a vector (Cuturi 2013, algorithm
                             1). A quarter of the time, and half the collectives.

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


_MAX_EXPONENT = 700.0  # of e, in float64
_SPREAD = 8  # bound / epsilon in an exponent: 2 of a score, 4 of a scaling, and a margin


@torch.no_grad()
def sinkhorn(
    scores_BK: Tensor,
    *,
    epsilon: float,
    num_iterations: int,
    group: dist.ProcessGroup | None = None,
    bound: float | None = None,
    num_last: int | None = None,
) -> Tensor:
    """Codes of this rank's samples, [B, K], balanced over the samples of all ranks of `group`.

    Args:
        scores_BK: feature · prototype, not divided by epsilon; every rank brings the same B. Codes
            have their dtype, but at least float32.
        epsilon: entropy weight, > 0.
        num_iterations: each makes prototypes equal, then samples sum to one. With 0 only the grand
            total is normalised (to the number of samples of all ranks), so rows do not sum to one.
        group: ranks whose samples are balanced together; None is this process alone.
        bound: the largest score there can be, by absolute value: 1 for cosines; None: not known.
        num_last: return the codes of so many last samples only; None: of all.

    An iteration costs one all_reduce of K numbers with a bound, two without; no host
    synchronisation; no gradient.
    """
    with torch.autocast(scores_BK.device.type, enabled=False):
        exponents_BK = scores_BK.to(torch.float64, copy=True).div_(epsilon)
        last = slice(-num_last if num_last else None, None)
        if bound is not None and _SPREAD * bound / epsilon < _MAX_EXPONENT:
            codes = _scaled(exponents_BK, bound / epsilon, num_iterations, last, group)
        else:
            codes = _on_logarithms(exponents_BK, num_iterations, last, group)
        return codes.to(torch.promote_types(scores_BK.dtype, torch.float32))


def _scaled(
    exponents_BK: Tensor,
    largest: float,
    num_iterations: int,
    last: slice,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """diag(u) · exp(exponents) · diag(v), whose scalings u and v alone are iterated."""
    top_B = exponents_BK.amax(dim=1)
    kernel_BK = exponents_BK.sub_(top_B.unsqueeze(1)).exp_()
    sample_B = top_B.sub_(largest).exp_()
    prototype_K = torch.ones_like(kernel_BK[0])
    if num_iterations == 0:
        total = _sum_over_ranks(torch.dot(sample_B, kernel_BK.sum(dim=1)), group)
        prototype_K *= _world_size(group) * len(sample_B) / total
    for _ in range(num_iterations):
        prototype_K = _sum_over_ranks(kernel_BK.T @ sample_B, group).reciprocal_()
        sample_B = (kernel_BK @ prototype_K).reciprocal_()
    return sample_B[last].unsqueeze(1) * kernel_BK[last] * prototype_K


def _on_logarithms(
    log_codes_BK: Tensor, num_iterations: int, last: slice, group: dist.ProcessGroup | None
) -> Tensor:
    if num_iterations == 0:
        total = _logsumexp_over_ranks(log_codes_BK.flatten().logsumexp(dim=0), group)
        log_codes_BK -= total - math.log(_world_size(group) * len(log_codes_BK))
    for _ in range(num_iterations):
        log_codes_BK -= _logsumexp_over_ranks(log_codes_BK.logsumexp(dim=0), group)
        log_codes_BK -= log_codes_BK.logsumexp(dim=1, keepdim=True)
    return log_codes_BK[last].exp_()


def harden(codes: Tensor) -> Tensor:
    """Codes [..., K] with all of a sample's mass on its best prototype (SwAV, section 4.1)."""
    best = codes.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(codes).scatter_(-1, best, 1.0)


def _sum_over_ranks(partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if _world_size(group) > 1:
        dist.all_reduce(partial, group=group)
    return partial


def _logsumexp_over_ranks(partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log Σ_ranks exp(partial), elementwise; relative to the largest, so that nothing overflows."""
    if _world_size(group) == 1:
        return partial
    largest = partial.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = (partial - largest).exp_()
    dist.all_reduce(total, group=group)
    return total.log_().add_(largest)


def _world_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)
