"""Linear probe: how well a frozen trunk's features are separated by planes.

Multinomial logistic regression on features that are computed once, of images as they are. It is
convex, so L-BFGS (Liu and Nocedal 1989) goes to its one minimum and there is no schedule to
choose; the only setting, the strength of the L2 penalty, is chosen on a tenth of the bank. It is
not the protocol of the published ImageNet figures (SGD over augmented images, eval_linear.py).

    min over W, b   mean_n −log softmax(W x_n + b)[y_n] + strength/2 · ‖W‖²

x are standardised: every feature with mean 0 and standard deviation 1 over the bank.

Shapes: N images of the bank, Q queries, D features, C labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = (1e-2, 1e-3, 1e-4, 1e-5)
"""Strong to weak, so that each minimum is a good beginning for the next."""
HELD_OUT = 10
"""One in so many images of the bank chooses the strength."""

_MAX_ITERATIONS = 150
_GRADIENT_TOLERANCE = 1e-5
_MIN_STD = 1e-6
"""A feature that varies less is constant: it is not blown up."""


@dataclass(frozen=True)
class Probe:
    """accuracy: share of queries classified rightly. strength: of the penalty that was chosen."""

    accuracy: float
    strength: float


def linear_accuracy(
    queries_QD: Tensor,
    query_labels: Tensor,
    bank_ND: Tensor,
    bank_labels: Tensor,
    *,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> Probe:
    """Fit on the bank, classify the queries.

    Args:
        queries_QD, bank_ND: features of any scale; computed with in their dtype.
        query_labels, bank_labels: int64 [Q], [N], labels counted from 0.
        strengths: of the penalty, to choose from; at equal accuracy the first is taken.
        seed: which tenth of the bank chooses.

    A bank of fewer than ten images is not cut: the first strength is taken.
    """
    num_labels = int(max(query_labels.max(), bank_labels.max())) + 1
    mean, std = bank_ND.mean(dim=0), bank_ND.std(dim=0, correction=0).clamp(min=_MIN_STD)
    bank_ND, queries_QD = (bank_ND - mean) / std, (queries_QD - mean) / std

    strength = strengths[0]
    held_out, rest = _cut(len(bank_ND), seed)
    if len(strengths) > 1 and len(held_out):
        rightness = _path(
            *(bank_ND[rest], bank_labels[rest], bank_ND[held_out], bank_labels[held_out]),
            num_labels=num_labels,
            strengths=strengths,
        )
        strength = strengths[rightness.index(max(rightness))]
    (accuracy,) = _path(
        *(bank_ND, bank_labels, queries_QD, query_labels),
        num_labels=num_labels,
        strengths=[strength],
    )
    return Probe(accuracy, strength)


def fit(features_ND: Tensor, labels: Tensor, *, strength: float, start: Tensor) -> Tensor:
    """The minimum, [C, D + 1] with the biases in the last column, sought from `start`."""
    weight = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [weight],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=_GRADIENT_TOLERANCE,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        search.zero_grad()
        scores_NC = _scores(features_ND, weight)
        penalty = strength / 2 * weight[:, :-1].square().sum()
        loss = torch.nn.functional.cross_entropy(scores_NC, labels) + penalty
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    search.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach()


def _path(
    features_ND: Tensor,
    labels: Tensor,
    others_QD: Tensor,
    other_labels: Tensor,
    *,
    num_labels: int,
    strengths: Sequence[float],
) -> list[float]:
    """Accuracy on the others for every strength."""
    weight = features_ND.new_zeros(num_labels, features_ND.shape[1] + 1)
    accuracies = []
    for strength in strengths:
        weight = fit(features_ND, labels, strength=strength, start=weight)
        hits = _scores(others_QD, weight).argmax(dim=1) == other_labels
        accuracies.append(hits.double().mean().item())
    return accuracies


def _scores(features_ND: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(weight[:, -1], features_ND, weight[:, :-1].T)


def _cut(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the held-out tenth, and of the rest."""
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return shuffled[: count // HELD_OUT], shuffled[count // HELD_OUT :]
