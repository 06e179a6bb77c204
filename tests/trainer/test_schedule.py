"""trainer.schedule against the reference's schedules, step by step."""

import numpy as np
import pytest

from tests.support import golden
from trainer.schedule import warmup_cosine

CASES = golden.meta("lr_schedule")


@pytest.mark.parametrize("case", CASES)
def test_every_step(case: str):
    arguments = CASES[case]
    total_steps = arguments["epochs"] * arguments["iters_per_epoch"]
    seen = [
        warmup_cosine(
            step,
            base_lr=arguments["base_lr"],
            final_lr=arguments["final_lr"],
            start_lr=arguments["start_warmup"],
            warmup_steps=arguments["warmup_epochs"] * arguments["iters_per_epoch"],
            total_steps=total_steps,
        )
        for step in range(total_steps)
    ]
    np.testing.assert_allclose(
        seen, golden.arrays("lr_schedule")[f"{case}__lr"], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_a_step_outside_the_run_is_refused(step: int):
    with pytest.raises(ValueError, match=f"step {step} is outside a run of 10 steps"):
        warmup_cosine(step, base_lr=1, final_lr=0, start_lr=0, warmup_steps=2, total_steps=10)
