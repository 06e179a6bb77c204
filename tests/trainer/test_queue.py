"""trainer.queue in the reference's sequences of steps, on one and two real ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import golden
from tests.support.processes import run_ranks
from trainer.loss import swav_loss
from trainer.queue import FeatureQueue
from trainer.sinkhorn import sinkhorn

CASES = golden.meta("swav_queue_seq")


def _of_size(world_size: int) -> list[str]:
    return [case for case, arguments in CASES.items() if arguments["world_size"] == world_size]


def _codes(
    queue: FeatureQueue | None, scores_VBK: torch.Tensor, prototypes_KD: torch.Tensor, case: str
) -> torch.Tensor:
    arguments = CASES[case]
    group = dist.group.WORLD if arguments["world_size"] > 1 else None
    codes = []
    for index, crop in enumerate(arguments["crops_for_assign"]):
        scores = scores_VBK[crop]
        if queue is not None and queue.is_full:
            scores = torch.cat([queue.features[index] @ prototypes_KD.T, scores])
        balanced = sinkhorn(
            scores, epsilon=arguments["epsilon"], num_iterations=arguments["iters"], group=group
        )
        codes.append(balanced[-arguments["B"] :])
    return torch.stack(codes)


def _step(
    case: str, rank: int, step: int, queue: FeatureQueue | None, dtype: torch.dtype
) -> dict[str, Any]:
    arguments = CASES[case]
    num_crops, crops = arguments["n_crops"], arguments["crops_for_assign"]
    scores = golden.tensor("swav_queue_seq", f"{case}__scores", dtype)[rank, step].requires_grad_()
    features = golden.tensor("swav_queue_seq", f"{case}__embedding", dtype)[rank, step]
    raw_prototypes = golden.tensor("swav_queue_seq", f"{case}__prototypes_raw", dtype)[step]
    prototypes = torch.nn.functional.normalize(raw_prototypes, dim=1)
    used = queue is not None and queue.is_full
    codes = _codes(queue, scores.detach().unflatten(0, (num_crops, -1)), prototypes, case)
    loss = swav_loss(
        scores,
        codes,
        num_crops=num_crops,
        crops_for_assign=crops,
        temperature=arguments["temperature"],
    )
    loss.backward()
    if queue is not None:
        queue.push(features.unflatten(0, (num_crops, -1))[crops])
    return {
        "loss": loss.detach().double(),
        "codes": codes.double(),
        "grad_scores": scores.grad.double(),
        "used": used,
        "queue": None if queue is None else queue.features.clone(),
    }


def _run(case: str, rank: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    arguments = CASES[case]
    queue, steps = None, []
    for step in range(arguments["T"]):
        if step == arguments["epoch_queue_starts"] * arguments["iters_per_epoch"]:
            queue = FeatureQueue(
                arguments["queue_length"],
                arguments["D"],
                len(arguments["crops_for_assign"]),
                batch_size=arguments["B"],
                world_size=arguments["world_size"],
                dtype=dtype,
            )
            assert queue.length == arguments["queue_length_truncated_global"]
            assert queue.features.shape[1] == arguments["queue_length_per_rank"]
        steps.append(_step(case, rank, step, queue, dtype))
    return steps


def _check(case: str, rank: int, steps: list[dict[str, Any]], suffix: str, atol: float) -> None:
    expected = golden.arrays("swav_queue_seq")
    for step, seen in enumerate(steps):
        where = f"{case} rank {rank} step {step}"
        assert seen["used"] == expected[f"{case}__queue_used"][step].any(), where
        for name in ("loss", "codes", "grad_scores"):
            key = f"{case}__{name}_{suffix}"
            if key in expected:
                target = torch.tensor(expected[key][rank, step]).double()
                torch.testing.assert_close(seen[name], target, rtol=0, atol=atol)
        if (key := f"{case}__queue_after") in expected:
            after = torch.tensor(expected[key][rank, step])
            held = torch.zeros_like(after) if seen["queue"] is None else seen["queue"].float()
            assert torch.equal(held, after), where


@pytest.mark.parametrize(
    ("dtype", "suffix", "atol"), [(torch.float32, "f32", 5e-6), (torch.float64, "f64", 1e-12)]
)
@pytest.mark.parametrize("case", _of_size(1))
def test_one_rank(case: str, dtype: torch.dtype, suffix: str, atol: float):
    _check(case, 0, _run(case, 0, dtype), suffix, atol)


def _rank_runs():
    rank = dist.get_rank()
    dtypes = (torch.float32, torch.float64)
    return {case: [_run(case, rank, dtype) for dtype in dtypes] for case in _of_size(2)}


@pytest.mark.dist
def test_two_ranks():
    for rank, runs in enumerate(run_ranks(_rank_runs, 2)):
        for case, (f32, f64) in runs.items():
            _check(case, rank, f32, "f32", 5e-6)
            _check(case, rank, f64, "f64", 1e-12)


def _filled(num_pushes: int) -> FeatureQueue:
    queue = FeatureQueue(8, 3, 2, batch_size=2, world_size=2)
    for number in range(num_pushes):
        queue.push(torch.full((2, 2, 3), float(number + 1)))
    return queue


def test_full_is_known_without_looking_at_the_features():
    queue = _filled(1)
    queue.push(torch.zeros(2, 2, 3))
    assert queue.is_full
    assert queue.features[0, :, 0].tolist() == [0, 0, 1, 1]


def test_state_round_trip_is_a_copy():
    queue, other = _filled(3), _filled(0)
    other.load_state_dict(queue.state_dict())
    queue.push(torch.zeros(2, 2, 3))
    assert other.is_full
    assert other.num_pushes == 3
    assert other.features[1, :, 2].tolist() == [3, 3, 2, 2]


def test_pushed_features_keep_no_graph():
    queue = _filled(0)
    queue.push(torch.ones(2, 2, 3, requires_grad=True) * 2)
    assert not queue.features.requires_grad


def test_length_zero_is_absent():
    queue = FeatureQueue(3, 3, 2, batch_size=2, world_size=2)
    queue.push(torch.ones(2, 2, 3))
    assert queue.length == 0
    assert not queue.is_full
    assert queue.features.shape == (2, 0, 3)


def test_wrong_shapes_are_refused():
    queue = _filled(0)
    with pytest.raises(ValueError, match=r"takes features \(2, 2, 3\), got \(2, 1, 3\)"):
        queue.push(torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="saved queue"):
        FeatureQueue(16, 3, 2, batch_size=2, world_size=2).load_state_dict(queue.state_dict())
    with pytest.raises(ValueError, match="positive"):
        FeatureQueue(8, 3, 2, batch_size=0, world_size=2)
