"""k nearest neighbours: what a frozen trunk knows, without training anything.

The convention of DINO (dinov2, eval/knn.py): cosine similarity s to the k nearest, each voting for
its label with weight exp(s / 0.07).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_QUERIES_AT_ONCE = 1024


def knn_accuracy(
    queries_QD: Tensor,
    query_labels: Tensor,
    bank_ND: Tensor,
    bank_labels: Tensor,
    *,
    neighbours: Sequence[int],
    temperature: float,
    leave_one_out: bool = False,
) -> dict[int, float]:
    """Share of queries whose label the vote finds, for every k of `neighbours`.

    Args:
        queries_QD, bank_ND: L2-normalised features.
        query_labels, bank_labels: int64 [Q], [N], labels counted from 0.
        leave_one_out: queries and bank are the same rows; a row does not vote for itself.

    A k larger than the bank is left out of the result.
    """
    bank_size = len(bank_ND) - leave_one_out
    usable = [k for k in neighbours if k <= bank_size]
    if not usable:
        return {}
    num_labels = int(max(query_labels.max(), bank_labels.max())) + 1
    hits = dict.fromkeys(usable, 0)
    for first in range(0, len(queries_QD), _QUERIES_AT_ONCE):
        rows = slice(first, first + _QUERIES_AT_ONCE)
        similarity_QN = queries_QD[rows] @ bank_ND.T
        if leave_one_out:
            similarity_QN.diagonal(first).fill_(-torch.inf)
        nearest = similarity_QN.topk(max(usable), dim=1)
        weights = (nearest.values / temperature).exp()
        voters = bank_labels[nearest.indices]
        for k in usable:
            votes = torch.zeros(len(voters), num_labels, dtype=weights.dtype)
            votes.scatter_add_(1, voters[:, :k], weights[:, :k])
            hits[k] += int((votes.argmax(dim=1) == query_labels[rows]).sum())
    return {k: count / len(queries_QD) for k, count in hits.items()}
