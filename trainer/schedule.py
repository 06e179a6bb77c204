"""The learning rate of a step: linear warm-up, then half a cosine.

As in the reference (facebookresearch/swav, main_swav.py), step by step: the warm-up includes both
its ends, so base_lr occurs twice (last step of the warm-up, first of the cosine), and final_lr is
approached, never reached.
"""

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Section `schedule`: the learning rate over the run, and how long prototypes stay as drawn."""

    base_lr: Annotated[float, Gt(0)] = 4.8
    final_lr: Annotated[float, Ge(0)] = 0.0048
    start_lr: Annotated[float, Ge(0)] = 0.3  # of the warm-up's first step
    warmup_epochs: Annotated[int, Ge(0)] = 10
    warmup_steps: Annotated[int, Ge(-1)] = -1  # -1: warmup_epochs' worth
    # First steps without prototype updates; -1: they stay as drawn for the whole run.
    freeze_prototypes_steps: Annotated[int, Ge(-1)] = 313


def warmup_cosine(
    step: int,
    *,
    base_lr: float,
    final_lr: float,
    start_lr: float,
    warmup_steps: int,
    total_steps: int,
) -> float:
    """The learning rate to set before `step` (0 … total_steps - 1).

    step < warmup_steps:  start_lr + (base_lr - start_lr) · step / (warmup_steps - 1)
    otherwise, with t = (step - warmup_steps) / (total_steps - warmup_steps):
                          final_lr + (base_lr - final_lr) · (1 + cos π t) / 2

    A warm-up of one step is that step at start_lr. Raises ValueError for a step outside the run.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside a run of {total_steps} steps")
    if step < warmup_steps:
        return start_lr + (base_lr - start_lr) * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final_lr + (base_lr - final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
