import pytest
import torch

from trainer.evaluate.knn import knn_accuracy


def clusters(per_label: int, seed: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors around the axes of three dimensions, labelled by axis."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(per_label)
    noise = spread * torch.randn(len(labels), 3, generator=generator)
    return torch.nn.functional.normalize(torch.eye(3)[labels] + noise, dim=1), labels


def brute_force(queries, query_labels, bank, bank_labels, k, temperature) -> float:
    """The definition, one query at a time."""
    hits = 0
    for query, label in zip(queries, query_labels, strict=True):
        similarity = (bank @ query).tolist()
        votes = [0.0, 0.0, 0.0]
        for index in sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]:
            votes[int(bank_labels[index])] += float(
                torch.tensor(similarity[index] / temperature).exp()
            )
        hits += votes.index(max(votes)) == int(label)
    return hits / len(queries)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_definition(temperature):
    queries, query_labels = clusters(20, 0, 0.8)
    bank, bank_labels = clusters(30, 1, 0.8)
    found = knn_accuracy(
        queries, query_labels, bank, bank_labels, neighbours=[1, 7, 90], temperature=temperature
    )
    assert found.keys() == {1, 7, 90}
    for k, accuracy in found.items():
        expected = brute_force(queries, query_labels, bank, bank_labels, k, temperature)
        assert accuracy == pytest.approx(expected)


def test_separated_clusters_are_found_and_shuffled_labels_are_not():
    bank, labels = clusters(30, 1, 0.05)
    arguments = {"neighbours": [10], "temperature": 0.07, "leave_one_out": True}
    assert knn_accuracy(bank, labels, bank, labels, **arguments) == {10: 1.0}
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert knn_accuracy(bank, shuffled, bank, shuffled, **arguments)[10] < 0.6


def test_a_row_has_no_vote_of_its_own():
    """Two rows a label, each nearest to the other label's: only its own vote would save it."""
    bank = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    )
    labels = torch.tensor([0, 1, 0, 1])
    arguments = {"neighbours": [1, 4], "temperature": 0.07}
    assert knn_accuracy(bank, labels, bank, labels, **arguments)[1] == 1.0
    alone = knn_accuracy(bank, labels, bank, labels, leave_one_out=True, **arguments)
    assert alone == {1: 0.0}, "and k=4 is more than the three others"
