"""A step in parts, and what it shows of itself; the arithmetic is in test_trajectories.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import golden
from tests.support.trajectory import Case, one_step, plain_engine, run
from trainer.engine import PlainEngine
from trainer.models.batchnorm import paused_statistics
from trainer.sinkhorn import harden
from trainer.step import swav_step

PLAIN, RESNET = "traj_ws1_plain", "traj_ws1_resnet"


def in_parts(case: Case, num_parts: int) -> PlainEngine:
    model = case.model()
    return PlainEngine(model, case.optimizer(model), accumulation_steps=num_parts)


@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_batch_in_parts_is_trained_on_as_a_whole(num_parts: int) -> None:
    """Without BatchNorm: 25 steps of the reference, in parts of 4 and of 2 images, with a queue."""
    case = Case(PLAIN, torch.float64)
    found = run(case, in_parts(case, num_parts))
    losses = torch.tensor(found.losses, dtype=torch.float64)
    assert (losses - case.loss()).abs().max() < 1e-10
    for name, value in case.state("final64").items():
        torch.testing.assert_close(found.state[name], value, rtol=1e-9, atol=1e-11)
    assert found.queue_used == golden.arrays(PLAIN)["queue_used"].tolist()


def test_the_pass_for_the_codes_does_not_move_batchnorm() -> None:
    """Each part moves the statistics once a resolution, and the head's once."""
    case = Case(RESNET, torch.float64)
    engine = in_parts(case, 2)
    one_step(case, engine, None, 0)
    counts = {
        name: int(value)
        for name, value in engine.module.state_dict().items()
        if name.endswith("num_batches_tracked")
    }
    assert {n for name, n in counts.items() if name.startswith("backbone")} == {2 * 2}
    assert {n for name, n in counts.items() if name.startswith("projection_head")} == {2}


def test_paused_statistics_normalise_by_the_batch_all_the_same() -> None:
    case = Case(RESNET, torch.float64)
    engine = plain_engine(case)
    before = {name: value.clone() for name, value in engine.module.named_buffers()}
    with paused_statistics(engine.module), torch.no_grad():
        paused = engine.forward(case.crops(0))
    for name, value in engine.module.named_buffers():
        assert torch.equal(value, before[name])
    torch.testing.assert_close(paused, engine.forward(case.crops(0)), rtol=0, atol=0)
    assert any(not torch.equal(v, before[n]) for n, v in engine.module.named_buffers())


def observed(num_parts: int, **options: Any) -> Any:
    case = Case(PLAIN, torch.float64)
    return swav_step(
        in_parts(case, num_parts),
        case.crops(0),
        queue=None,
        num_crops=8,
        crops_for_assign=(0, 1),
        temperature=0.1,
        epsilon=0.05,
        num_iterations=3,
        lr=0.1,
        freeze_prototypes=False,
        observe=True,
        **options,
    ).observed


def test_what_is_observed_is_in_the_order_of_the_batch() -> None:
    whole, parts = observed(1), observed(4)
    assert whole.features_VBD.shape == (8, 8, 16)
    assert whole.scores_VBK.shape == (8, 8, 30)
    assert whole.codes_ABK.shape == (2, 8, 30)
    for name in ("features_VBD", "scores_VBK", "codes_ABK", "loss"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_hard_codes_have_one_prototype_a_sample() -> None:
    soft, hard = observed(1), observed(1, hard_codes=True)
    assert torch.equal(hard.codes_ABK.sum(dim=-1), torch.ones(2, 8, dtype=torch.float64))
    assert torch.equal(hard.codes_ABK.argmax(dim=-1), soft.codes_ABK.argmax(dim=-1))
    assert set(hard.codes_ABK.unique().tolist()) == {0.0, 1.0}
    assert hard.loss != soft.loss


def test_harden_keeps_shape_and_dtype() -> None:
    codes: Tensor = torch.tensor([[[0.2, 0.5, 0.3]]], dtype=torch.float32)
    assert harden(codes).tolist() == [[[0.0, 1.0, 0.0]]]
    assert harden(codes).dtype == torch.float32


def test_parts_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="8 images cannot be cut into 3"):
        observed(3)
