"""One step of SwAV: the arithmetic between the loop (trainer.train) and the engine.

SwAV (Caron et al. 2020), section 3.1, in the order of the reference (facebookresearch/swav,
main_swav.train):

    c_k ← c_k / ‖c_k‖                       prototypes on the unit sphere
    z_v = f(x_v) / ‖f(x_v)‖,  z_v · C       features and scores of every crop v
    q_a = Sinkhorn([queue_a; z_a] · C)      codes of assigned crops a, over all ranks (eq. 3-5)
    ℓ   = mean_{a, v≠a} −Σ_k q_ak log softmax_k(z_v · C / τ)                   (eq. 1, 2, 6)
    θ   ← LARC(θ, ∇ℓ)                       prototypes left alone while they are frozen

With accumulation a batch goes through the model in parts. Codes are still those of the whole
batch: a first pass without gradient gives the scores of the assigned crops of all parts. It leaves
BatchNorm's running statistics alone; without BatchNorm the step is that of the undivided batch.

Shapes: V crops an image, A of them assigned codes, B images on this rank, D features, K prototypes.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.engine import Engine
from trainer.health import Observed
from trainer.loss import swav_loss
from trainer.models.batchnorm import paused_statistics
from trainer.queue import FeatureQueue
from trainer.sinkhorn import harden, sinkhorn


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind: on the device, without gradient, not yet waited for."""

    loss: Tensor  # scalar, of this rank
    observed: Observed | None = None  # if asked for


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
    hard_codes: bool = False,
    group: dist.ProcessGroup | None = None,
    observe: bool = False,
) -> StepResult:
    """Train on one batch. `crops` are the engine's forward's, [V_g*B, 3, s, s] each, crop-major.

    The queue takes part in the codes if it was full before this batch, whose features it then
    receives. `group` are the ranks whose samples Sinkhorn balances together; None is this process
    alone. Never waits for the device.
    """
    batch = _Batch(crops, num_crops, crops_for_assign, engine.accumulation_steps)
    engine.normalize_prototypes()
    passed = engine.forward(crops) if batch.num_parts == 1 else None
    features_ABD, scores_ABK = _assigned(batch, *passed) if passed else _first_pass(engine, batch)

    if queue is not None:
        if queue.is_full:  # old features, today's prototypes; the batch comes last
            scores_ABK = torch.cat([queue.features @ engine.prototypes().T, scores_ABK], dim=1)
        queue.push(features_ABD)
    balance = functools.partial(
        sinkhorn,
        epsilon=epsilon,
        num_iterations=num_iterations,
        group=group,
        bound=1.0,  # cosines
        num_last=batch.size,
    )
    codes_ABK = torch.stack([balance(scores_BK) for scores_BK in scores_ABK])
    if hard_codes:
        codes_ABK = harden(codes_ABK)

    losses, seen = [], []
    for number, part in enumerate(batch.parts()):
        features_ND, scores_NK = passed or engine.forward(part)
        loss = swav_loss(
            scores_NK,
            batch.rows_of_part(codes_ABK, number),
            num_crops=num_crops,
            crops_for_assign=crops_for_assign,
            temperature=temperature,
        )
        engine.backward(loss)
        losses.append(loss.detach())
        if observe:
            seen.append((features_ND.detach(), scores_NK.detach()))
    engine.step(lr=lr, freeze_prototypes=freeze_prototypes)
    mean_loss = torch.stack(losses).mean()
    return StepResult(mean_loss, _observed(batch, seen, codes_ABK, mean_loss) if observe else None)


class _Batch:
    """A rank's crops, and how they are cut into parts of equally many images."""

    def __init__(
        self, crops: Sequence[Tensor], num_crops: int, assigned: Sequence[int], num_parts: int
    ) -> None:
        self.crops = crops
        self.num_crops = num_crops
        self.assigned = tuple(assigned)
        self.num_parts = num_parts
        self.size = sum(len(images) for images in crops) // num_crops
        if self.size % num_parts:
            raise ValueError(f"{self.size} images cannot be cut into {num_parts} equal parts")

    def parts(self) -> Iterator[Sequence[Tensor]]:
        """Every part's crops, as the engine takes them."""
        if self.num_parts == 1:
            yield self.crops
            return
        for number in range(self.num_parts):
            yield [self._part(images, number) for images in self.crops]

    def assigned_parts(self) -> Iterator[list[Tensor]]:
        """Of every part only the crops that are assigned codes, one tensor each."""
        for part in self.parts():
            size = self.size // self.num_parts
            each = [crop for images in part for crop in torch.split(images, size)]
            yield [each[crop] for crop in self.assigned]

    def rows_of_part(self, rows_ABX: Tensor, number: int) -> Tensor:
        """[A, B, X] -> [A, B / num_parts, X]."""
        return rows_ABX.chunk(self.num_parts, dim=1)[number]

    def _part(self, images: Tensor, number: int) -> Tensor:
        crops_VBX = images.view(-1, self.size, *images.shape[1:])
        part = crops_VBX.chunk(self.num_parts, dim=1)[number].flatten(0, 1)
        layout = torch.channels_last if _is_channels_last(images) else torch.contiguous_format
        return part.contiguous(memory_format=layout)


def _is_channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last)


def _assigned(batch: _Batch, features_ND: Tensor, scores_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the crops that get codes, without gradient: [V*B, X] -> [A, B, X]."""
    found = []
    for rows in (features_ND, scores_NK):
        rows_VBX = rows.detach().view(batch.num_crops, -1, rows.shape[1])
        # Not indexed by a list: that would travel to the device and make the host wait.
        found.append(torch.stack([rows_VBX[crop] for crop in batch.assigned]))
    return found[0], found[1]


@torch.no_grad()
def _first_pass(engine: Engine, batch: _Batch) -> tuple[Tensor, Tensor]:
    """Features [A, B, D] and scores [A, B, K] of the assigned crops of all parts."""
    with paused_statistics(engine.module):
        parts = [engine.forward(crops) for crops in batch.assigned_parts()]
    return _join(parts, len(batch.assigned))


def _observed(
    batch: _Batch, seen: Sequence[tuple[Tensor, Tensor]], codes_ABK: Tensor, loss: Tensor
) -> Observed:
    features_VBD, scores_VBK = _join(seen, batch.num_crops)
    return Observed(features_VBD, scores_VBK, codes_ABK, batch.assigned, loss)


def _join(parts: Sequence[tuple[Tensor, Tensor]], num_crops: int) -> tuple[Tensor, Tensor]:
    """Features and scores of parts, [V*b, X] each, as those of the batch, [V, B, X]."""
    features, scores = (
        torch.cat([rows_NX.view(num_crops, -1, rows_NX.shape[1]) for rows_NX in each], dim=1)
        for each in zip(*parts, strict=True)
    )
    return features, scores
