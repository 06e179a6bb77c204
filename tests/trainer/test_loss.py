"""trainer.loss against the reference's loss, gradient and codes."""

from typing import Any

import pytest
import torch

from tests.support import golden
from trainer.loss import LossConfig, swav_loss
from trainer.sinkhorn import sinkhorn

CASES = golden.meta("swav_loss")
TOLERANCES = {torch.float32: ("f32", 5e-6, 1e-6), torch.float64: ("f64", 1e-12, 1e-13)}


def _close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def _codes(scores: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    scores_VBK = scores.unflatten(0, (arguments["n_crops"], -1))
    return torch.stack(
        [
            sinkhorn(
                scores_VBK[crop],
                epsilon=arguments["epsilon"],
                num_iterations=arguments["iters"],
            )
            for crop in arguments["crops_for_assign"]
        ]
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(case: str, dtype: torch.dtype):
    arguments = CASES[case]
    suffix, loss_atol, grad_atol = TOLERANCES[dtype]
    scores = golden.tensor("swav_loss", f"{case}__scores", dtype).requires_grad_()
    codes = _codes(scores, arguments)
    loss = swav_loss(
        scores,
        codes,
        num_crops=arguments["n_crops"],
        crops_for_assign=arguments["crops_for_assign"],
        temperature=arguments["temperature"],
    )
    loss.backward()
    _close(codes, golden.tensor("swav_loss", f"{case}__codes_{suffix}"), loss_atol)
    _close(loss, golden.tensor("swav_loss", f"{case}__loss_{suffix}"), loss_atol)
    _close(scores.grad, golden.tensor("swav_loss", f"{case}__grad_scores_{suffix}"), grad_atol)


def test_loss_is_float32_under_autocast():
    scores, codes = torch.randn(6, 4), torch.rand(1, 2, 4)
    arguments = {"num_crops": 3, "crops_for_assign": (1,), "temperature": 0.1}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = swav_loss(scores.bfloat16(), codes, **arguments)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, swav_loss(scores.bfloat16().float(), codes, **arguments))


@pytest.mark.parametrize(
    ("num_crops", "crops", "num_codes"),
    [(1, (0,), 1), (4, (0,), 1), (3, (3,), 1), (3, (0, 1), 1), (3, (), 0)],
)
def test_contradictions_are_refused(num_crops: int, crops: tuple[int, ...], num_codes: int):
    with pytest.raises(ValueError, match="crops"):
        swav_loss(
            torch.zeros(6, 5),
            torch.zeros(num_codes, 2, 5),
            num_crops=num_crops,
            crops_for_assign=crops,
            temperature=0.1,
        )


@pytest.mark.parametrize("crops", [(), (0, 0), (-1, 0)])
def test_config_refuses(crops: tuple[int, ...]):
    with pytest.raises(ValueError, match="crops_for_assign"):
        LossConfig(crops_for_assign=crops)
