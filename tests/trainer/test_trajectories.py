"""25 steps of the reference, step by step through `swav_step` and every engine.

Tolerances are those of tests/golden/manifest.json.
"""

import pytest
import torch

from tests.support import golden
from tests.support.processes import run_ranks
from tests.support.trajectory import (
    Case,
    Trajectory,
    deepspeed_engine,
    one_step,
    plain_engine,
    run,
    this_world,
)
from trainer.engine import EngineConfig

STAGES = (0, 1, 2, 3)
ALONE = ("traj_ws1_plain", "traj_ws1_resnet")
# By world size; ALONE's batches are split over more ranks than one.
FILES = {1: ALONE, 2: (*ALONE, "traj_ws2_plain"), 4: ALONE}

# Followed by BatchNorm: its true gradient is zero, and LARC scales rounding errors up.
NOISE = ("projection_head.0.bias", "projection_head.1.running_mean")


def run_all(world_size: int) -> dict[str, Trajectory]:
    """On one rank: every file under every engine, by "<file> <engine>"."""
    rank = this_world().rank
    results = {}
    for name in FILES[world_size]:
        exact = Case(name, torch.float64, rank, world_size)
        results[f"{name} plain"] = run(exact, plain_engine(exact))
        for step in exact.meta["snapshots"]:
            results[f"{name} snapshot{step}"] = run_one(exact, step)
        case = Case(name, torch.float32, rank, world_size)
        for stage in STAGES:
            engine = deepspeed_engine(case, EngineConfig(zero_stage=stage))
            results[f"{name} zero{stage}"] = run(case, engine)
    return results


def run_one(case: Case, step: int) -> Trajectory:
    """One step from the reference's own state before it."""
    engine, queue = plain_engine(case), case.queue()
    engine.module.load_state_dict(case.state(f"snap{step}__before"))
    for name, momentum in case.state(f"snap{step}__momentum_before").items():
        parameter = engine.module.get_parameter(name)
        engine.optimizer.state[parameter]["momentum_buffer"].copy_(momentum)
    used = bool(golden.arrays(case.name)["queue_used"][step])
    queue.load_state_dict({"features": case.queued(step), "num_pushes": 1000 if used else 0})
    loss = one_step(case, engine, queue, step)
    return Trajectory([loss], [queue.is_full], dict(engine.module.state_dict()), queue.features)


@pytest.fixture(scope="module")
def results() -> dict[tuple[int, int], dict[str, Trajectory]]:
    """What every rank of every world size found, by (world size, rank)."""
    return {
        (world_size, rank): found
        for world_size in FILES
        for rank, found in enumerate(run_ranks(run_all, world_size, world_size))
    }


def ranks_of(name: str) -> list[tuple[int, int]]:
    return [(size, rank) for size, names in FILES.items() if name in names for rank in range(size)]


PLAIN = [
    (name, *where) for name in ("traj_ws1_plain", "traj_ws2_plain") for where in ranks_of(name)
]
RESNET = [("traj_ws1_resnet", *where) for where in ranks_of("traj_ws1_resnet")]

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(("name", "world_size", "rank"), PLAIN + RESNET)
def test_float64_equals_the_reference(results, name, world_size, rank):
    case = Case(name, torch.float64, rank, world_size)
    tolerance = 1e-10 if "plain" in name else 1e-9
    found = results[world_size, rank][f"{name} plain"]
    assert loss_errors(case, found).max() < tolerance
    assert found.queue_used == golden.arrays(name)["queue_used"].tolist()
    assert weight_errors(found, case.state("final64")) < tolerance


@pytest.mark.parametrize("engine", [f"zero{stage}" for stage in STAGES])
@pytest.mark.parametrize(("name", "world_size", "rank"), PLAIN)
def test_float32_under_deepspeed_equals_the_reference(results, name, world_size, rank, engine):
    case = Case(name, torch.float32, rank, world_size)
    found = results[world_size, rank][f"{name} {engine}"]
    assert loss_errors(case, found).max() < 2e-5
    assert weight_errors(found, case.state("final")) < 1e-5
    if not case.is_split:
        golden_queue = golden.tensor(name, "final_queue_f32")[rank]
        torch.testing.assert_close(found.queue, golden_queue, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", [f"zero{stage}" for stage in STAGES])
@pytest.mark.parametrize(("name", "world_size", "rank"), RESNET)
def test_float32_batchnorm_under_deepspeed_starts_like_the_reference(
    results, name, world_size, rank, engine
):
    case = Case(name, torch.float32, rank, world_size)
    errors = loss_errors(case, results[world_size, rank][f"{name} {engine}"])
    assert errors[:3].max() < 1e-4
    assert errors[3:7].max() < 1e-2  # chaotic in float32 from there on


@pytest.mark.parametrize(("name", "world_size", "rank"), PLAIN + RESNET)
def test_one_step_from_the_reference_state(results, name, world_size, rank):
    case = Case(name, torch.float64, rank, world_size)
    for step in case.meta["snapshots"]:
        found = results[world_size, rank][f"{name} snapshot{step}"]
        assert abs(found.losses[0] - case.loss()[step]) < 1e-12
        assert weight_errors(found, case.state(f"snap{step}__after")) < 1e-10
        if not case.is_split:
            after = golden.tensor(name, f"snap{step}__queue_after")[rank]
            torch.testing.assert_close(found.queue, after, rtol=0, atol=1e-12)


def loss_errors(case: Case, found: Trajectory) -> torch.Tensor:
    return (torch.tensor(found.losses, dtype=torch.float64) - case.loss()).abs()


def weight_errors(found: Trajectory, golden_state: dict[str, torch.Tensor]) -> float:
    """The largest relative L2 error of a tensor, without what is noise in a BatchNorm net."""
    ignored = NOISE if "backbone.bn1.weight" in golden_state else ()
    errors = [
        ((found.state[key].double() - value.double()).norm() / value.double().norm()).item()
        for key, value in golden_state.items()
        if value.is_floating_point() and key not in ignored
    ]
    return max(errors)
