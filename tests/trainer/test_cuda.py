"""What only a CUDA device can show; run with `pytest -m gpu` where there is one."""

import pytest
import torch

from tests.bench.step import Stepper, crops_of, engine_of, full_queue
from trainer.distributed import start_world
from trainer.engine import EngineConfig
from trainer.models import ModelConfig

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(backbone="resnet18", hidden_dim=64)


@pytest.fixture(scope="module", autouse=True)
def world():
    return start_world()


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_host_does_not_wait_in_a_step(stage: int, precision: str) -> None:
    config = EngineConfig(zero_stage=stage, precision=precision)
    crops = [each.cuda() for each in crops_of(8)]
    step = Stepper(engine_of(MODEL, config, device="cuda"), crops, full_queue(8, device="cuda"))
    for _ in range(3):
        step.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_on_finite_numbers(stage: int, precision: str) -> None:
    config = EngineConfig(zero_stage=stage, precision=precision)
    crops = [each.cuda() for each in crops_of(8)]
    step = Stepper(engine_of(MODEL, config, device="cuda"), crops, None)
    before = [fragment.weight.clone() for fragment in step.engine.fragments()]
    for _ in range(20):
        step.run()
    after = [fragment.weight for fragment in step.engine.fragments()]
    assert all(weight.isfinite().all() for weight in after)
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
