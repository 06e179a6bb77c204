import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.processes import run_ranks
from tests.support.trajectory import (
    Case,
    deepspeed_engine,
    masters,
    one_step,
    plain_engine,
    run,
    this_world,
)
from trainer.engine import PRECISIONS, Engine, EngineConfig

CASE = "traj_ws2_plain"
STAGES = (0, 1, 2, 3)


def differs(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    # Normalising a unit row again moves its last bit; a step moves everything a thousandfold.
    return [name for name in left if not torch.allclose(left[name], right[name], 1e-6, 1e-8)]


def observe() -> dict[str, Any]:
    """On one of two ranks: what the assertions below look at."""
    case = Case(CASE, torch.float32, this_world().rank, 2)
    found: dict[str, Any] = {}
    for stage in STAGES:
        found["normalize", stage] = observe_normalize(case, stage)
        found["freeze", stage] = observe_freeze(case, stage)
        found["publish", stage] = observe_publish(case, stage)
        found["bf16", stage] = observe_half(case, stage, "bf16")
        found["fp16", stage] = observe_half(case, stage, "fp16")
        found["overflow", stage] = observe_overflow(case, stage)
    found["averaging"] = observe_averaging(case)
    return found


def observe_normalize(case: Case, stage: int) -> dict[str, Any]:
    engine = deepspeed_engine(case, EngineConfig(zero_stage=stage))
    run_steps(engine, case, range(7, 10))  # no longer frozen: they have left the sphere
    before = masters(engine)["prototypes.weight"]
    engine.normalize_prototypes()
    return {
        "before": before,
        "master": masters(engine)["prototypes.weight"],
        "module": engine.module.get_parameter("prototypes.weight").detach().clone(),
        "here": sum(len(f.weight) for f in engine.fragments() if "prototypes" in f.name),
    }


def observe_freeze(case: Case, stage: int) -> dict[str, Any]:
    engine = deepspeed_engine(case, EngineConfig(zero_stage=stage))
    engine.normalize_prototypes()
    before = masters(engine), masters(engine, "momentum")
    run_steps(engine, case, range(1))
    after = masters(engine), masters(engine, "momentum")
    run_steps(engine, case, range(7, 8))
    thawed = masters(engine), masters(engine, "momentum")
    return {
        "frozen": [differs(*pair) for pair in zip(before, after, strict=True)],
        "thawed": [differs(*pair) for pair in zip(after, thawed, strict=True)],
    }


def observe_publish(case: Case, stage: int) -> list[str]:
    engine = deepspeed_engine(case, EngineConfig(zero_stage=stage))
    for fragment in engine.fragments():
        fragment.weight.copy_(torch.arange(fragment.start, fragment.start + len(fragment.weight)))
    engine.publish()
    return [
        name
        for name, parameter in engine.module.named_parameters()
        if not torch.equal(parameter.view(-1), torch.arange(float(parameter.numel())))
    ]


def observe_half(case: Case, stage: int, precision: str) -> dict[str, Any]:
    engine = deepspeed_engine(case, EngineConfig(zero_stage=stage, precision=precision))
    pooled: list[torch.dtype] = []
    hook = engine.module.projection_head.register_forward_hook(
        lambda module, inputs, output: pooled.append(output.dtype)
    )
    features, scores = engine.forward(case.crops(0))
    hook.remove()
    exact = plain_engine(case).forward(case.crops(0))[1]
    found = run(case, engine, steps=12)
    return {
        "dtypes": (pooled[0], features.dtype, scores.dtype),
        "masters": {fragment.weight.dtype for fragment in engine.fragments()},
        "losses": found.losses,
        "error": (scores - exact).abs().max().item(),
    }


def observe_overflow(case: Case, stage: int) -> dict[str, Any]:
    """A loss scale so large that gradients overflow, then one that is not."""
    engine = deepspeed_engine(case, EngineConfig(zero_stage=stage, precision="fp16"))
    run_steps(engine, case, range(1))
    scale = engine.optimizer.loss_scale
    assert scale is not None
    before = masters(engine), masters(engine, "momentum")
    scale.fill_(2.0**40)
    run_steps(engine, case, range(7, 8))
    after = masters(engine), masters(engine, "momentum")
    scale_after = scale.item()
    scale.fill_(2.0**10)
    run_steps(engine, case, range(7, 8))
    return {
        "changed": [differs(*pair) for pair in zip(before, after, strict=True)],
        "scale": scale_after,
        "moved": differs(after[0], masters(engine)),
        "finite": all(value.isfinite().all() for value in masters(engine).values()),
    }


def observe_averaging(case: Case) -> dict[str, Tensor]:
    engine = plain_engine(case)
    _, scores = engine.forward(case.crops(0))
    engine.backward(scores.sum() * (case.rank + 1))
    engine.step(lr=1.0, freeze_prototypes=False)
    return masters(engine)


def run_steps(engine: Engine, case: Case, steps: range) -> None:
    for step in steps:
        one_step(case, engine, None, step)


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_ranks(observe, 2)


@pytest.mark.dist
@pytest.mark.parametrize("stage", STAGES)
def test_prototypes_are_normalised_in_master_and_module(ranks, stage):
    found = [rank["normalize", stage] for rank in ranks]
    lengths = found[0]["before"].norm(dim=1)
    assert (lengths - 1).abs().max() > 1e-4
    for each in found:
        torch.testing.assert_close(each["master"].norm(dim=1), torch.ones(30), rtol=0, atol=1e-6)
        assert torch.equal(each["master"], each["module"])
        assert torch.equal(each["module"], found[0]["module"])


@pytest.mark.dist
def test_under_stage_1_each_rank_holds_a_part_of_the_prototypes(ranks):
    parts = [rank["normalize", 1]["here"] for rank in ranks]
    assert sum(parts) == 30 * 16
    assert min(parts) > 0


@pytest.mark.dist
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_prototypes_keep_weight_and_momentum(ranks, stage):
    for rank in ranks:
        for moved in rank["freeze", stage]["frozen"]:
            assert "prototypes.weight" not in moved
            assert len(moved) == 11  # everything else
        for moved in rank["freeze", stage]["thawed"]:
            assert "prototypes.weight" in moved


@pytest.mark.dist
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_written_into_fragments_is_published(ranks, stage):
    for rank in ranks:
        assert rank["publish", stage] == []


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_computes_over_float32_masters(ranks, stage, precision):
    for rank in ranks:
        found = rank[precision, stage]
        assert found["dtypes"] == (PRECISIONS[precision], torch.float32, torch.float32)
        assert found["masters"] == {torch.float32}
        assert torch.isfinite(torch.tensor(found["losses"])).all()
        assert 0 < found["error"] < 0.02


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_the_same_under_all_stages(ranks, precision):
    for rank in ranks:
        zero0, *others = (torch.tensor(rank[precision, stage]["losses"]) for stage in STAGES)
        for other in others:
            torch.testing.assert_close(zero0, other, rtol=0, atol=1e-3)


@pytest.mark.dist
@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_leaves_everything_as_it_is_and_halves_the_scale(ranks, stage):
    for rank in ranks:
        found = rank["overflow", stage]
        assert found["changed"] == [[], []]
        assert found["scale"] == 2.0**39
        assert len(found["moved"]) == 12
        assert found["finite"]


@pytest.mark.dist
def test_plain_engine_averages_gradients(ranks):
    for name, weight in ranks[0]["averaging"].items():
        assert torch.equal(weight, ranks[1]["averaging"][name])


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )


def test_plain_engine_does_not_load_deepspeed():
    done = run_python("""
        import sys
        from tests.support.trajectory import Case, plain_engine, run
        run(Case("traj_ws1_plain"), plain_engine(Case("traj_ws1_plain")), steps=1)
        print("deepspeed" in sys.modules)
    """)
    assert done.stdout == "False\n"


@pytest.mark.dist
def test_deepspeed_writes_nothing_to_stdout_and_no_known_noise_to_stderr():
    done = run_python("""
        from trainer.distributed import start_world, stop_world
        world = start_world()
        from tests.support.trajectory import Case, deepspeed_engine, run
        from trainer.engine import EngineConfig
        engine = deepspeed_engine(Case("traj_ws1_plain"), EngineConfig(zero_stage=1))
        run(Case("traj_ws1_plain"), engine, steps=2)
        assert world.gather(world.rank) == [0] and world.share("x") == "x"
        assert world.mean([1.0, 2.0]).tolist() == [1.0, 2.0]
        stop_world()
    """)
    assert done.stdout == ""
    assert done.stderr == ""
