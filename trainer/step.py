"""One step of SwAV: the arithmetic between the loop (trainer.train) and the engine.

SwAV (Caron et al. 2020), section 3.1, in the order of the reference (facebookresearch/swav,
main_swav.train):

    c_k ← c_k / ‖c_k‖                       prototypes on the unit sphere
    z_v = f(x_v) / ‖f(x_v)‖,  z_v · C       features and scores of every crop v
    q_a = Sinkhorn([queue_a; z_a] · C)      codes of assigned crops a, over all ranks (eq. 3-5)
    ℓ   = mean_{a, v≠a} −Σ_k q_ak log softmax_k(z_v · C / τ)                   (eq. 1, 2, 6)
    θ   ← LARC(θ, ∇ℓ)                       prototypes left alone while they are frozen

Shapes: V crops an image, A of them assigned codes, B images on this rank, D features, K prototypes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.engine import Engine
from trainer.loss import swav_loss
from trainer.queue import FeatureQueue
from trainer.sinkhorn import sinkhorn


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind: on the device, without gradient, not yet waited for."""

    loss: Tensor  # scalar, of this rank


def swav_step(
    engine: Engine,
    crops: Sequence[Tensor],
    *,
    queue: FeatureQueue | None,
    num_crops: int,
    crops_for_assign: Sequence[int],
    temperature: float,
    epsilon: float,
    num_iterations: int,
    lr: float,
    freeze_prototypes: bool,
    group: dist.ProcessGroup | None = None,
) -> StepResult:
    """Train on one batch. `crops` are the engine's forward's, [V_g*B, 3, s, s] each, crop-major.

    The queue takes part in the codes if it was full before this batch, whose features it then
    receives. `group` are the ranks whose samples Sinkhorn balances together; None is this process
    alone. Never waits for the device.
    """
    engine.normalize_prototypes()
    features_ND, scores_NK = engine.forward(crops)

    features_ABD = _assigned(features_ND, num_crops, crops_for_assign)
    scores_ABK = _assigned(scores_NK, num_crops, crops_for_assign)
    if queue is not None and queue.is_full:
        prototypes_KD = engine.module.get_parameter("prototypes.weight").detach()
        # Old features, today's prototypes; the batch comes last.
        scores_ABK = torch.cat([queue.features @ prototypes_KD.T, scores_ABK], dim=1)
    if queue is not None:
        queue.push(features_ABD)

    batch_size = features_ABD.shape[1]
    balance = functools.partial(
        sinkhorn, epsilon=epsilon, num_iterations=num_iterations, group=group
    )
    codes_ABK = torch.stack([balance(scores_BK)[-batch_size:] for scores_BK in scores_ABK])
    loss = swav_loss(
        scores_NK,
        codes_ABK,
        num_crops=num_crops,
        crops_for_assign=crops_for_assign,
        temperature=temperature,
    )
    engine.backward(loss)
    engine.step(lr=lr, freeze_prototypes=freeze_prototypes)
    return StepResult(loss.detach())


def _assigned(rows: Tensor, num_crops: int, crops_for_assign: Sequence[int]) -> Tensor:
    """The rows of the crops that get codes, without gradient: [V*B, X] -> [A, B, X]."""
    rows_VBX = rows.detach().view(num_crops, -1, rows.shape[1])
    # Not indexed by a list: that would travel to the device and make the host wait.
    return torch.stack([rows_VBX[crop] for crop in crops_for_assign])
