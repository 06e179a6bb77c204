"""trainer.sinkhorn against the reference's codes, on one, two and four real ranks."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.support import golden
from tests.support.processes import run_ranks
from trainer.sinkhorn import sinkhorn

CASES = golden.meta("sinkhorn")
OVERFLOWS = {"underflow_eps005", "dead_prototype_eps008", "ws2_rank0_fp32_overflow"}


MIXED = {case for case in CASES if f"{case}__codes_o1" in golden.arrays("sinkhorn")}


def _codes(case: str, rank: int, dtype: torch.dtype, group: dist.ProcessGroup | None):
    """As sinkhorn gives them without a bound, having compared them with those it gives with one."""
    every = golden.tensor("sinkhorn", f"{case}__scores").to(dtype)
    options = {
        "epsilon": CASES[case]["epsilon"],
        "num_iterations": CASES[case]["sinkhorn_iterations"],
        "group": group,
    }
    codes = sinkhorn(every[rank], **options)
    bound = every.abs().max().item()
    bounded = sinkhorn(every[rank], **options, bound=bound)
    rtol = 1e-11 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(bounded, codes, rtol=rtol, atol=0, msg=lambda m: f"{case} {m}")
    last = sinkhorn(every[rank], **options, bound=bound, num_last=2)
    assert torch.equal(last, bounded[-2:])
    return codes


def _of_size(world_size: int) -> list[str]:
    return [case for case, arguments in CASES.items() if arguments["world_size"] == world_size]


def _check(case: str, codes_f32: torch.Tensor, codes_f64: torch.Tensor) -> None:
    expected = golden.tensor("sinkhorn", f"{case}__codes_f64")
    assert codes_f64.dtype == torch.float64
    assert codes_f32.dtype == torch.float32
    torch.testing.assert_close(codes_f64, expected, rtol=1e-11, atol=0, msg=lambda m: f"{case} {m}")
    rtol, atol = (0, 1e-6) if case in OVERFLOWS else (1e-4, 1e-8)
    torch.testing.assert_close(
        codes_f32.double(), expected, rtol=rtol, atol=atol, msg=lambda m: f"{case} {m}"
    )


def _check_mixed(case: str, codes: torch.Tensor) -> None:
    """Codes of half scores, against the reference under mixed precision and against the truth."""
    mixed = golden.tensor("sinkhorn", f"{case}__codes_o1")
    torch.testing.assert_close(codes, mixed, rtol=0, atol=2e-3)
    truth = golden.tensor("sinkhorn", f"{case}__codes_f64")
    top = truth.argmax(dim=-1, keepdim=True)
    tops = codes.gather(-1, top).double(), truth.gather(-1, top)
    torch.testing.assert_close(*tops, rtol=0.01, atol=0)


def test_every_case_is_covered():
    assert len(_of_size(1)) + len(_of_size(2)) + len(_of_size(4)) == len(CASES)


@pytest.mark.parametrize("case", _of_size(1))
def test_one_rank(case: str):
    f32, f64 = (_codes(case, 0, dtype, None)[None] for dtype in (torch.float32, torch.float64))
    _check(case, f32, f64)


@pytest.mark.parametrize("case", [case for case in _of_size(1) if case in MIXED])
def test_half_precision_scores_on_one_rank(case: str):
    _check_mixed(case, _codes(case, 0, torch.float16, None)[None])


def _rank_codes(cases: list[str]):
    rank, group = dist.get_rank(), dist.group.WORLD
    dtypes = torch.float32, torch.float64, torch.float16
    return {case: [_codes(case, rank, dtype, group) for dtype in dtypes] for case in cases}


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks(world_size: int):
    by_rank = run_ranks(_rank_codes, world_size, _of_size(world_size))
    for case in _of_size(world_size):
        f32, f64, f16 = (torch.stack([codes[case][i] for codes in by_rank]) for i in range(3))
        _check(case, f32, f64)
        if case in MIXED:
            _check_mixed(case, f16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_give_float32_codes(dtype: torch.dtype):
    scores = golden.tensor("sinkhorn", "cos_eps05_it3__scores")[0].to(dtype)
    codes = sinkhorn(scores, epsilon=0.05, num_iterations=3)
    expected = sinkhorn(scores.float(), epsilon=0.05, num_iterations=3)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, expected)


def test_no_gradient_and_no_change_of_the_scores():
    scores = torch.randn(6, 4, requires_grad=True)
    before = scores.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = sinkhorn(scores, epsilon=0.05, num_iterations=3)
    assert not codes.requires_grad
    assert codes.dtype == torch.float32
    assert torch.equal(scores, before)


@given(
    num_samples=st.integers(1, 12),
    num_prototypes=st.integers(1, 9),
    epsilon=st.floats(0.5, 2.0),
    seed=st.integers(0, 2**32),
)
def test_marginals(num_samples: int, num_prototypes: int, epsilon: float, seed: int):
    """Samples sum to one exactly; prototypes reach B / K once the iteration has converged."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.rand(num_samples, num_prototypes, generator=generator).double() - 1
    codes = sinkhorn(scores, epsilon=epsilon, num_iterations=500)
    per_prototype = torch.full((num_prototypes,), num_samples / num_prototypes).double()
    assert (codes >= 0).all()
    torch.testing.assert_close(codes.sum(1), torch.ones(num_samples).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(codes.sum(0), per_prototype, rtol=1e-6, atol=0)


@given(seed=st.integers(0, 2**32), epsilon=st.floats(0.002, 1.0), decoys=st.integers(0, 3))
def test_cosines_give_the_same_codes_both_ways(seed: int, epsilon: float, decoys: int):
    """Some prototypes lie opposite to every sample: nobody's mass reaches them in float32."""
    generator = torch.Generator().manual_seed(seed)
    features, prototypes = (torch.randn(n, 4, generator=generator).double() for n in (9, 6))
    prototypes[:decoys] = -features.mean(dim=0)
    features, prototypes = (
        torch.nn.functional.normalize(each, dim=1) for each in (features, prototypes)
    )
    options = {"epsilon": epsilon, "num_iterations": 3}
    codes = sinkhorn(features @ prototypes.T, **options)
    bounded = sinkhorn(features @ prototypes.T, **options, bound=1.0)
    assert codes.isfinite().all()
    torch.testing.assert_close(bounded, codes, rtol=1e-9, atol=1e-300)


@given(seed=st.integers(0, 2**32), shift=st.floats(-50, 50))
def test_codes_do_not_depend_on_a_constant(seed: int, shift: float):
    scores = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)).double()
    codes = [sinkhorn(s, epsilon=0.05, num_iterations=3) for s in (scores, scores + shift)]
    torch.testing.assert_close(*codes, rtol=1e-9, atol=1e-12)
