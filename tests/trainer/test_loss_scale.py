import torch

from trainer.loss_scale import INITIAL, LARGEST, STEPS_TO_GROW, LossScale


def test_it_halves_at_an_overflow_and_doubles_after_a_while() -> None:
    scale, yes, no = LossScale("cpu"), torch.tensor(True), torch.tensor(False)
    scale.update(yes)
    assert scale.value == INITIAL / 2
    for _ in range(STEPS_TO_GROW - 1):
        scale.update(no)
    assert scale.value == INITIAL / 2
    scale.update(no)
    assert scale.value == INITIAL
    assert scale.good_steps == 0


def test_it_goes_on_from_its_state() -> None:
    scale, other = LossScale("cpu"), LossScale("cpu")
    scale.update(torch.tensor(True))
    scale.update(torch.tensor(False))
    other.load(scale.state())
    assert other.state() == [INITIAL / 2, 1]


def test_it_stays_within_its_bounds() -> None:
    scale = LossScale("cpu")
    scale.value.fill_(LARGEST)
    scale.good_steps.fill_(STEPS_TO_GROW - 1)
    scale.update(torch.tensor(False))
    assert scale.value == LARGEST
    scale.value.fill_(1.0)
    scale.update(torch.tensor(True))
    assert scale.value == 1.0
