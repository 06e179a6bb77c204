"""The arithmetic of SwAV's loop as its authors wrote it, to be measured against ours.

Written from the paper (2006.09882, algorithm 1 and appendix A) and from apex's LARC: everything
between the trunk's features and the next forward pass. Loops over crops and over parameters, a
queue shifted row by row, exp() in Sinkhorn, norms that the host waits for.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

TEMPERATURE, EPSILON, ITERATIONS = 0.1, 0.05, 3
MOMENTUM, WEIGHT_DECAY, TRUST, LARC_EPS = 0.9, 1e-6, 0.001, 1e-8
ASSIGNED = (0, 1)


class ReferenceStep:
    """Takes over `prototypes` and `parameters`, all of which are to be trained."""

    def __init__(self, prototypes: nn.Linear, parameters: Iterable[nn.Parameter], queue: Tensor):
        self.prototypes = prototypes
        self.parameters = list(parameters)
        self.queue = queue  # [A, M, D], full
        self._sgd = torch.optim.SGD(self.parameters, lr=0.1, momentum=MOMENTUM)

    def loss(self, features: Tensor, num_crops: int) -> Tensor:
        """The loss of features [V*B, D]; the queue is shifted on the way."""
        with torch.no_grad():
            self.prototypes.weight.copy_(nn.functional.normalize(self.prototypes.weight, dim=1))
        scores = self.prototypes(features)
        size = len(features) // num_crops
        loss = torch.zeros(())
        for number, crop in enumerate(ASSIGNED):
            with torch.no_grad():
                codes = self._codes(number, features, scores, slice(crop * size, (crop + 1) * size))
            part = torch.zeros(())
            for other in range(num_crops):
                if other != crop:
                    logits = scores[other * size : (other + 1) * size] / TEMPERATURE
                    log_probs = nn.functional.log_softmax(logits, dim=1)
                    part = part - torch.mean(torch.sum(codes * log_probs, dim=1))
            loss = loss + part / (num_crops - 1)
        return loss / len(ASSIGNED)

    @torch.no_grad()
    def update(self) -> None:
        """LARC, parameter by parameter, around torch's SGD."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            weight_norm, grad_norm = parameter.norm(), parameter.grad.norm()
            if weight_norm != 0 and grad_norm != 0:
                ratio = TRUST * weight_norm / (grad_norm + weight_norm * WEIGHT_DECAY + LARC_EPS)
                parameter.grad += WEIGHT_DECAY * parameter
                parameter.grad *= ratio
        self._sgd.step()

    def _codes(self, number: int, features: Tensor, scores: Tensor, rows: slice) -> Tensor:
        size = rows.stop - rows.start
        mine = scores[rows].detach()
        if not torch.all(self.queue[number, -1] == 0):
            mine = torch.cat([self.queue[number] @ self.prototypes.weight.T, mine])
        self.queue[number, size:] = self.queue[number, :-size].clone()
        self.queue[number, :size] = features[rows].detach()
        return sinkhorn(mine)[-size:]


def sinkhorn(scores: Tensor) -> Tensor:
    """Codes [B, K] as in the paper's listing."""
    plan = torch.exp(scores / EPSILON).T
    num_prototypes, num_samples = plan.shape
    plan /= plan.sum()
    for _ in range(ITERATIONS):
        plan /= plan.sum(dim=1, keepdim=True)
        plan /= num_prototypes
        plan /= plan.sum(dim=0, keepdim=True)
        plan /= num_samples
    return (plan * num_samples).T


def flat_parameters(shapes: Sequence[torch.Size]) -> list[nn.Parameter]:
    """Parameters of given shapes, drawn anew."""
    return [nn.Parameter(0.05 * torch.randn(shape)) for shape in shapes]
