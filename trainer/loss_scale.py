"""The scale of a float16 loss, found while training; called by the engine once a step.

Gradients below 6e-8 vanish in float16 and those above 65,504 are infinite. So the loss is
multiplied by a power of two, the optimiser divides by it (trainer.optim), and the power is looked
for as apex and torch.amp do: halved after an overflow, whose step is left out, and doubled after
2,000 steps without one. Unlike theirs it lives on the device and the host never asks for it; and
whether there was an overflow is known to all ranks, while torch's GradScaler under ZeRO asks each
rank about its own share of the gradients alone.
"""

import torch
from torch import Tensor

INITIAL = 2.0**16
LARGEST = 2.0**24
STEPS_TO_GROW = 2000


class LossScale:
    """`value` is a float32 scalar on `device`; `good_steps` int64, since it last changed."""

    def __init__(self, device: torch.device | str) -> None:
        self.value = torch.tensor(INITIAL, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, overflow: Tensor) -> None:
        """After a step: `overflow` is a boolean scalar on the device."""
        good_steps = self.good_steps + 1
        grows = good_steps >= STEPS_TO_GROW
        grown = torch.where(grows, (self.value * 2).clamp(max=LARGEST), self.value)
        self.value.copy_(torch.where(overflow, (self.value / 2).clamp(min=1.0), grown))
        self.good_steps.copy_(torch.where(overflow | grows, 0, good_steps))

    def state(self) -> list[float]:
        """What a checkpoint keeps; the host waits for it."""
        return [self.value.item(), self.good_steps.item()]

    def load(self, state: list[float]) -> None:
        """Go on from what `state` gave."""
        value, good_steps = state
        self.value.fill_(value)
        self.good_steps.fill_(int(good_steps))
