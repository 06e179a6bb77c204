"""trainer.evaluate.linear against scikit-learn, and on data whose answer is known."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from trainer.evaluate.linear import STRENGTHS, fit, linear_accuracy


def clouds(per_label: int, seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """Points around the corners of a triangle, far from the origin and of uneven scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(per_label)
    corners = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.5], [0.0, 1.0, -0.5]])
    noise = spread * torch.randn(len(labels), 3, generator=generator)
    points = corners[labels] + noise
    return points * torch.tensor([1.0, 100.0, 0.01]) + torch.tensor([5.0, -300.0, 7.0]), labels


def test_separated_clouds_are_told_apart_and_shuffled_labels_are_not() -> None:
    bank, labels = clouds(100, 0, 0.05)
    queries, query_labels = clouds(50, 1, 0.05)
    assert linear_accuracy(queries, query_labels, bank, labels).accuracy == 1.0
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert linear_accuracy(queries, query_labels, bank, shuffled).accuracy < 0.7


def test_what_no_plane_separates_stays_so() -> None:
    """Exclusive or: four corners, opposite ones alike."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]).repeat(25, 1)
    labels = torch.tensor([0, 0, 1, 1]).repeat(25)
    assert linear_accuracy(corners, labels, corners, labels).accuracy <= 0.75


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_the_minimum_is_that_of_scikit_learn(strength: float) -> None:
    features, labels = clouds(60, 2, 0.6)
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    start = torch.zeros(3, 4, dtype=torch.float64)
    found = fit(features.double(), labels, strength=strength, start=start)
    # Theirs is C · Σ_n loss + ‖W‖² / 2, without a penalty for the biases either.
    theirs = LogisticRegression(C=1 / (strength * len(labels)), tol=1e-10, max_iter=10_000)
    theirs.fit(features.double().numpy(), labels.numpy())
    assert found[:, :-1].numpy() == pytest.approx(theirs.coef_, abs=1e-4)
    differences = (found[:, -1] - found[0, -1]).numpy()  # a constant over all labels is free
    expected = theirs.intercept_ - theirs.intercept_[0]
    assert differences == pytest.approx(expected, abs=1e-4)


def test_the_penalty_is_chosen_on_the_bank_alone() -> None:
    """Noise in as many dimensions as there are images: a weak penalty fits it, and errs."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(2).repeat(500)
    bank, queries = torch.randn(2, 1000, 400, generator=generator)
    bank[:, 0] += 2.0 * labels
    queries[:, 0] += 2.0 * labels
    grid = (1e-5, 0.3)  # the weak one first, which is taken when both are equal
    chosen = linear_accuracy(queries, labels, bank, labels, strengths=grid)
    assert chosen.strength == 0.3
    weak = linear_accuracy(queries, labels, bank, labels, strengths=grid[:1])
    assert chosen.accuracy > weak.accuracy
    # Other queries, the same choice.
    assert linear_accuracy(-queries, labels, bank, labels, strengths=grid).strength == 0.3


def test_a_constant_feature_and_a_small_bank_do_no_harm() -> None:
    bank = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    labels = torch.tensor([0, 1])
    probe = linear_accuracy(torch.tensor([[9.0, 0.2], [1.0, 0.9]]), labels, bank, labels)
    assert probe.strength == STRENGTHS[0]
    assert probe.accuracy == 1.0
