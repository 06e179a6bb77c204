"""Prototypes: normalised, and left alone while frozen."""

import pytest
import torch
from torch import nn

from tests.support import golden
from trainer.loss import swav_loss
from trainer.optim import LARC, normalize_rows, parameter_groups
from trainer.sinkhorn import sinkhorn

TOLERANCES = {
    torch.float32: ("f32", {"norm": 2e-7, "loss": 1e-5, "prototypes": 1e-6, "fc": 3e-5}),
    torch.float64: ("f64", {"norm": 1e-15, "loss": 1e-12, "prototypes": 1e-12, "fc": 1e-12}),
}
FREEZE = golden.meta("prototypes")["freeze"]


def _close(actual: torch.Tensor, key: str, atol: float, index: int | None = None) -> None:
    expected = golden.tensor("prototypes", key).double()
    expected = expected if index is None else expected[index]
    torch.testing.assert_close(actual.detach().double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_normalised(dtype: torch.dtype):
    suffix, atol = TOLERANCES[dtype]
    weight = golden.tensor("prototypes", "norm__w", dtype).requires_grad_()
    normalize_rows(weight)
    _close(weight, f"norm__w_normalised_{suffix}", atol["norm"])


class _Model(nn.Module):
    """The freezing golden's model: one linear layer, unit length, prototypes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc = nn.Linear(FREEZE["din"], FREEZE["D"], dtype=dtype)
        self.prototypes = nn.Linear(FREEZE["D"], FREEZE["K"], bias=False, dtype=dtype)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(golden.tensor("prototypes", f"freeze__init__{name}"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.prototypes(nn.functional.normalize(self.fc(x), dim=1))


def _loss(model: _Model, step: int, dtype: torch.dtype) -> torch.Tensor:
    scores = model(golden.tensor("prototypes", "freeze__x", dtype)[step].flatten(0, 1))
    codes = [
        sinkhorn(
            scores.unflatten(0, (FREEZE["V"], -1))[crop],
            epsilon=FREEZE["epsilon"],
            num_iterations=FREEZE["sinkhorn_iterations"],
        )
        for crop in FREEZE["crops_for_assign"]
    ]
    return swav_loss(
        scores,
        torch.stack(codes),
        num_crops=FREEZE["V"],
        crops_for_assign=FREEZE["crops_for_assign"],
        temperature=FREEZE["temperature"],
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_frozen_steps_and_those_after(dtype: torch.dtype):
    suffix, atol = TOLERANCES[dtype]
    model = _Model(dtype)
    weight = model.prototypes.weight
    optimizer = LARC(
        parameter_groups(model),
        lr=0.0,
        momentum=FREEZE["momentum"],
        weight_decay=FREEZE["wd"],
        trust_coefficient=FREEZE["trust_coefficient"],
    )
    for step in range(FREEZE["T"]):
        for group in optimizer.param_groups:
            group["lr"] = FREEZE["lr"][step]
        optimizer.param_groups[1]["frozen"] = step < FREEZE["freeze"]
        normalize_rows(weight)
        _close(weight, f"freeze__protos_at_forward_{suffix}", atol["prototypes"], step)
        optimizer.zero_grad()
        loss = _loss(model, step, dtype)
        loss.backward()
        optimizer.step()
        _close(loss, f"freeze__loss_{suffix}", atol["loss"], step)
        _close(weight, f"freeze__protos_after_step_{suffix}", atol["prototypes"], step)
        _close(model.fc.weight, f"freeze__fc_weight_after_step_{suffix}", atol["fc"], step)
        _close(model.fc.bias, f"freeze__fc_bias_after_step_{suffix}", atol["fc"], step)
        expected_state = bool(golden.arrays("prototypes")["freeze__protos_has_momentum"][step])
        assert (weight in optimizer.state) == expected_state
        if expected_state:
            momentum = optimizer.state[weight]["momentum_buffer"]
            _close(momentum, f"freeze__protos_momentum_{suffix}", atol["prototypes"], step)
