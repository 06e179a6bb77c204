"""Whether the training is well: figures taken of a step on the device, logged with its loss.

Called by the loop (trainer.train) at logged steps, on every rank; `trainer.watch` reads the figures
and rings. Nothing here waits for the device, and a logged step costs two all_reduce.

    health/code_entropy           of a sample's code, mean, in nats. A loss is at least this, since
                                  a cross-entropy is; ln K: the codes say nothing
    health/prototypes_used        share of prototypes that were some sample's best one of late
    health/nearest_prototypes     largest cosine of two prototypes
    health/duplicate_prototypes   share of prototypes that another one can hardly be told from
    health/loss_below_chance      ln K - loss: by how much better than guessing
    health/feature_std            of a feature's dimension, times sqrt(D): 1 is spread over the
                                  whole sphere, 0 every image is the same
    health/crop_agreement         share of other crops whose best prototype is the code's
    health/queue_drift            how far a queued feature has gone stale when it leaves the queue:
                                  0 not at all, 1 it says nothing of its image any more

SwAV (Caron et al. 2020) has no such figures; they are what people ask for whose loss stays at ln K
or rises when the queue starts (facebookresearch/swav issues 12, 42, 62, 71, 88, lightly issue
1148).

Shapes: V crops an image, A of them assigned codes, B images on this rank, D features, K prototypes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

SAMPLES_PER_PROTOTYPE = 10
"""Samples seen, as a multiple of K, after which a prototype that was nobody's best counts as dead.

Were all equally popular, a share of e^-10 would be missed by chance; were their popularities spread
exponentially, 1/11."""

MIN_WINDOW = 10
"""Logged steps in which a prototype must have been nobody's best, however large the batch is."""

DUPLICATE_COSINE = 0.99
"""From here on two prototypes are duplicates: at SwAV's temperature of 0.1, whatever the feature,
the logits of the two differ by 1.4 at most."""

MAX_COMPARED = 2048
"""Prototypes of a rank that are compared with all others at a logged step."""

MAX_PROBED = 32
"""Images of a rank that are kept to see how their features drift."""

PROBE_EVERY = 5
"""Ages of the queue between the beginnings of two probes: each costs the trunk two passes."""

_MAX_COSINES = 1 << 24  # held at once: 64 MB


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Section `health`: from when on a figure is an alarm. An alarm never stops a run."""

    # Steps for which the loss or the features must have stayed as they are to be called stuck, and
    # trends are taken over; what shows at once (drift, a rise) rings after a tenth of them.
    patience_steps: Annotated[int, Gt(0)] = 1000
    quiet_steps: Annotated[int, Gt(0)] = 5000  # without cause until the same alarm may ring again
    chance_margin: Annotated[float, Gt(0)] = 0.002  # share of ln K: a loss so near to it is at it
    max_loss_rise: Annotated[float, Gt(0)] = 0.05  # share of ln K, above the lowest loss so far
    max_code_entropy: Annotated[float, Gt(0), Le(1)] = 0.9  # share of ln K
    min_feature_std: Annotated[float, Ge(0), Le(1)] = 0.1  # 1: spread over the sphere
    min_prototypes_used: Annotated[float, Ge(0), Le(1)] = 0.5  # share of K
    max_duplicate_prototypes: Annotated[float, Ge(0), Le(1)] = 0.3  # share of K
    max_queue_drift: Annotated[float, Ge(0), Le(1)] = 0.3  # 1: a stored feature says nothing
    max_grad_growth: Annotated[float, Gt(1)] = 100.0  # times what gradient norms were before
    min_trust_ratio: Annotated[float, Ge(0)] = 1e-9  # smallest of all parameters; LARC's own unit


@dataclass(frozen=True)
class Observed:
    """What one step shows of itself: of this rank, on the device, without gradient.

    features_VBD: float32, of length one. scores_VBK: feature · prototype. codes_ABK: rows sum to
    one, in the order of `crops_for_assign`, which says whose crop's they are. loss: scalar.
    """

    features_VBD: Tensor
    scores_VBK: Tensor
    codes_ABK: Tensor
    crops_for_assign: tuple[int, ...]
    loss: Tensor


class Health:
    """Measures steps, and remembers when a prototype was last some sample's best.

    One batch cannot tell which prototypes are in use: 64 samples can at most be the best of 128 of
    3,000. So a prototype counts as used until it was nobody's best in a window of the measured
    steps, which is as long as it takes to see SAMPLES_PER_PROTOTYPE · K samples. All count as used
    at first, so neither a start nor a resume looks like a death. The queue's samples are left out:
    they were measured when they were a batch.

    The best prototype is the code's, after Sinkhorn, which gives every prototype its share: one
    that is still nobody's best is far from all features.

    Comparing K prototypes with each other would take K² cosines, 40 GB at 100,000. Every rank
    compares MAX_COMPARED of them with all, other ones at every measured step; figures are those
    of the last so many steps as it takes to come round (one if K <= MAX_COMPARED · ranks).
    """

    def __init__(self) -> None:
        self._num_measured = 0
        self._last_best_K: Tensor | None = None  # number of the measured step
        self._compared_R2: Tensor | None = None  # nearest, duplicates of the last R steps

    @torch.no_grad()
    def measure(
        self,
        observed: Observed,
        *,
        prototypes_KD: Tensor,
        group: dist.ProcessGroup | None = None,
    ) -> dict[str, Tensor]:
        """Figures over the samples of all ranks, by the names they are logged under.

        Args:
            observed: every rank brings the same number of images.
            prototypes_KD: the rows need not have length one.
            group: ranks whose samples are measured together; None is this process alone.

        Scalars in float32 on the device, the same on all ranks, which call it at the same
        steps. Two all_reduce, of K + 1 and 2 D + 4 numbers; the host never waits.
        """
        self._num_measured += 1
        best_AB = observed.codes_ABK.argmax(dim=-1)
        nearest, duplicates = self._compare(prototypes_KD, group)
        entropy, loss, agreement, duplicates, *moments = _mean_over_ranks(
            [
                _entropy(observed.codes_ABK),
                observed.loss,
                _agreement(observed, best_AB),
                duplicates,
                *_moments(_assigned(observed)),
            ],
            group,
        )
        used, nearest = self._latest(best_AB, len(prototypes_KD), nearest, group)
        nearest, duplicates = self._rotated(nearest, duplicates, _rotation(prototypes_KD, group))
        figures = {
            "code_entropy": entropy,
            "prototypes_used": used,
            "nearest_prototypes": nearest,
            "duplicate_prototypes": duplicates,
            "loss_below_chance": math.log(len(prototypes_KD)) - loss,
            "feature_std": _spread(*moments),
            "crop_agreement": agreement,
        }
        return {f"health/{name}": value.float() for name, value in figures.items()}

    def _compare(
        self, prototypes_KD: Tensor, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        """The largest cosine of this rank's share of prototypes, and how many are duplicates."""
        rank, world_size = _place(group)
        num_prototypes = len(prototypes_KD)
        num_rows = min(MAX_COMPARED, math.ceil(num_prototypes / world_size))
        start = (self._num_measured * world_size + rank) * num_rows
        rows_R = torch.arange(start, start + num_rows, device=prototypes_KD.device) % num_prototypes
        nearest_R = _nearest(nn.functional.normalize(prototypes_KD.float(), dim=1), rows_R)
        return nearest_R.max(), (nearest_R >= DUPLICATE_COSINE).double().mean()

    def _latest(
        self, best_AB: Tensor, num_prototypes: int, nearest: Tensor, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        """The share of prototypes used in the window, and the largest `nearest` of all ranks."""
        if self._last_best_K is None:
            self._last_best_K = torch.zeros(num_prototypes, device=best_AB.device)
        self._last_best_K.index_fill_(0, best_AB.flatten(), self._num_measured)
        latest = torch.cat([self._last_best_K, nearest.reshape(1)])
        if group is not None:
            dist.all_reduce(latest, op=dist.ReduceOp.MAX, group=group)
        self._last_best_K = latest[:-1]
        num_samples = best_AB.numel() * _place(group)[1]
        window = max(MIN_WINDOW, math.ceil(SAMPLES_PER_PROTOTYPE * num_prototypes / num_samples))
        used = (self._last_best_K > self._num_measured - window).double().mean()
        return used, latest[-1]

    def _rotated(self, nearest: Tensor, duplicates: Tensor, rotation: int) -> tuple[Tensor, Tensor]:
        """The largest cosine and the mean share over the last `rotation` measured steps."""
        new_2 = torch.stack([nearest.double(), duplicates])
        if self._compared_R2 is None:
            self._compared_R2 = new_2.repeat(rotation, 1)
        self._compared_R2[self._num_measured % rotation] = new_2
        return self._compared_R2[:, 0].max(), self._compared_R2[:, 1].mean()


class DriftProbe:
    """How stale the oldest features of a queue are, seen on a few images.

    The model encodes up to MAX_PROBED images of a rank, trains on for as many steps as a feature
    stays in the queue, and encodes them again. With z the features then, z' those now,

        drift = (1 - mean_i z_i · z'_i) / (1 - mean_{i≠j} z_i · z'_j)

    over the images of all ranks: 0 when nothing has changed, 1 when a stored feature is no nearer
    to its own image's than to other images' features. Features as such would not do: cosines of
    0.9 are close among features that are spread out, far among features that all point one way.

    The queue's own features serve as `then` no better: BatchNorm made them beside a whole batch.
    """

    def __init__(
        self, age_steps: int, *, every_steps: int, group: dist.ProcessGroup | None = None
    ) -> None:
        """`age_steps` is queue length / global batch. At most one probe every `every_steps`."""
        if min(age_steps, every_steps) < 1:
            raise ValueError("a drift takes at least one step, and so does the wait for the next")
        self._age_steps = age_steps
        self._every_steps = max(every_steps, PROBE_EVERY * age_steps)
        self._group = group
        self._begun: int | None = None  # step of the newest probe's begin
        self._kept: tuple[Tensor, Tensor] | None = None  # images and features, during a probe
        self._drift: Tensor | None = None

    @torch.no_grad()
    def visit(self, step: int, images: Tensor, encode: Callable[[Tensor], Tensor]) -> None:
        """Encode, at the first and the last step of a probe; otherwise nothing.

        Call it after every step on all ranks, with one global crop of the step's images,
        [B, 3, s, s]. `encode` maps images to features [n, D] of length one, without a trace in
        the model. One all_reduce at a probe's end; the host never waits.
        """
        if len(images) * _place(self._group)[1] < 2:
            return  # one image has no others to be compared with
        if self._kept is None and self._is_due(step, self._every_steps):
            self._begun = step
            images = images[:MAX_PROBED].clone()
            self._kept = images, encode(images).float()
        elif self._kept is not None and self._is_due(step, self._age_steps):
            images, stored_ND = self._kept
            self._drift = drift(stored_ND, encode(images).float(), self._group)
            self._kept = None

    def _is_due(self, step: int, num_steps: int) -> bool:
        return self._begun is None or step >= self._begun + num_steps

    def figures(self) -> dict[str, Tensor]:
        """`health/queue_drift` of the newest probe, a float32 scalar; nothing before the first."""
        return {} if self._drift is None else {"health/queue_drift": self._drift}


def drift(stored_ND: Tensor, fresh_ND: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """See DriftProbe: a float32 scalar, of the images of all ranks, N on each, two in all."""
    num_images = len(stored_ND) * _place(group)[1]
    same = (stored_ND * fresh_ND).sum()
    flat = torch.cat([stored_ND.sum(dim=0), fresh_ND.sum(dim=0), same.reshape(1)]).double()
    if group is not None:
        dist.all_reduce(flat, group=group)
    stored_D, fresh_D = flat[:-1].chunk(2)
    same = flat[-1]
    # The product of the sums is all pairs, those of an image with itself among them.
    others = (torch.dot(stored_D, fresh_D) - same) / (num_images * (num_images - 1))
    return ((1 - same / num_images) / (1 - others).clamp_min(1e-6)).float()


def _entropy(codes_ABK: Tensor) -> Tensor:
    """Mean entropy in nats of the codes, whose rows need not sum to one (0 Sinkhorn iterations)."""
    mass_AB = codes_ABK.sum(dim=-1).clamp_min(torch.finfo(codes_ABK.dtype).tiny)
    entropy_AB: Tensor = torch.special.entr(codes_ABK).sum(dim=-1) / mass_AB + mass_AB.log()
    return entropy_AB.clamp_min(0).mean()


def _agreement(observed: Observed, best_AB: Tensor) -> Tensor:
    """Share of pairs (assigned crop, other crop), as in the loss, that name the same prototype."""
    predicted_VB = observed.scores_VBK.argmax(dim=-1)
    num_crops = len(predicted_VB)
    shares = [
        (predicted_VB == best_B).double().sum(dim=0) - (predicted_VB[crop] == best_B).double()
        for crop, best_B in zip(observed.crops_for_assign, best_AB, strict=True)
    ]
    return torch.stack(shares).mean() / (num_crops - 1)


def _assigned(observed: Observed) -> Tensor:
    """Features of the crops that have codes, [A*B, D]: of one size, so of one distribution."""
    # Not indexed by a list: that would travel to the device and make the host wait.
    return torch.cat([observed.features_VBD[crop] for crop in observed.crops_for_assign])


def _moments(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    features_ND = features_ND.double()  # a difference of squares is to come
    return features_ND.mean(dim=0), features_ND.square().mean(dim=0)


def _spread(mean_D: Tensor, square_D: Tensor) -> Tensor:
    std_D = (square_D - mean_D.square()).clamp_min(0).sqrt()
    return std_D.mean() * math.sqrt(len(std_D))


def _nearest(prototypes_KD: Tensor, rows_R: Tensor) -> Tensor:
    """The cosine of each of some rows of unit length with the nearest other row: [R]."""
    num_rows = max(1, _MAX_COSINES // len(prototypes_KD))
    nearest = []
    for some_R in torch.split(rows_R, num_rows):
        cosines_RK = prototypes_KD[some_R] @ prototypes_KD.T
        cosines_RK.scatter_(1, some_R.unsqueeze(1), -1.0)  # with itself
        nearest.append(cosines_RK.amax(dim=1))
    return torch.cat(nearest)


def _rotation(prototypes_KD: Tensor, group: dist.ProcessGroup | None) -> int:
    """Measured steps after which every prototype has been compared."""
    return math.ceil(len(prototypes_KD) / (MAX_COMPARED * _place(group)[1]))


def _mean_over_ranks(values: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Means of scalars and vectors, in one all_reduce: float64."""
    flat = torch.cat([value.double().reshape(-1) for value in values])
    if group is not None:
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
    parts = torch.split(flat, [value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank and world size."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
