"""trainer.optim against apex's LARC around torch's SGD, whole and in flat partitions."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support import golden
from tests.support.processes import run_ranks
from trainer.optim import LARC, Segment, SegmentTable, parameter_groups

ARGUMENTS = golden.meta("larc_sgd")
NAMES = list(ARGUMENTS["params"])
DTYPES = {"f32": (torch.float32, 3e-6), "f64": (torch.float64, 1e-13)}
DECAYS = {"wd1e-6": 1e-6, "wd1e-2": 1e-2}


def _larc(params: Any, decay: float, **changes: Any) -> LARC:
    settings = {
        "lr": 0.0,
        "momentum": ARGUMENTS["momentum"],
        "weight_decay": decay,
        "trust_coefficient": ARGUMENTS["trust_coefficient"],
        "eps": ARGUMENTS["eps"],
        "clip": ARGUMENTS["clip"],
    }
    return LARC(params, **(settings | changes))


def _gradient(name: str, step: int, dtype: torch.dtype) -> Tensor | None:
    if name == "late" and step < ARGUMENTS["late_grad_from_step"]:
        return None
    return golden.tensor("larc_sgd", f"grad__{name}", dtype)[step]


def _check(seen: Tensor, key: str, step: int, scale: float, tolerance: float) -> None:
    expected = golden.tensor("larc_sgd", key)[step]
    assert seen.dtype == expected.dtype
    torch.testing.assert_close(seen, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("precision", DTYPES)
def test_equals_apex(precision: str, decay: str):
    dtype, tolerance = DTYPES[precision]
    params = {n: golden.tensor("larc_sgd", f"init__{n}", dtype).requires_grad_() for n in NAMES}
    optimizer = _larc(params.values(), DECAYS[decay])
    for step, lr in enumerate(golden.arrays("larc_sgd")["lr"].tolist()):
        optimizer.param_groups[0]["lr"] = lr
        for name, param in params.items():
            param.grad = _gradient(name, step, dtype)
        optimizer.step()
        for name, param in params.items():
            key = f"{decay}__{precision}"
            scale = golden.tensor("larc_sgd", f"{key}__param__{name}")[step].abs().max().item()
            _check(param.detach(), f"{key}__param__{name}", step, scale, tolerance)
            state = optimizer.state.get(param, {})
            momentum = state.get("momentum_buffer", torch.zeros_like(param).detach())
            _check(momentum, f"{key}__momentum__{name}", step, scale, tolerance)


def test_very_small_and_very_large_tensors_keep_their_ratio():
    for size in (1e-15, 1e15):
        param = torch.full((4,), size, requires_grad=True)
        param.grad = torch.full((4,), size)
        _larc([param], 0.0, lr=1.0, trust_coefficient=0.5, eps=0.0).step()
        torch.testing.assert_close(param.detach(), torch.full((4,), size / 2), rtol=1e-6, atol=0)


def test_no_gradient_no_state():
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    params[0].grad = torch.ones(3)
    optimizer = _larc(params, 0.1, lr=1.0)
    optimizer.step()
    assert params[0] in optimizer.state
    assert params[1] not in optimizer.state
    assert params[1].eq(1).all()


def test_a_frozen_group_is_left_out_wholly():
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = _larc([{"params": params[:1]}, {"params": params[1:], "frozen": True}], 0.1, lr=1.0)
    optimizer.step()
    assert params[1].eq(1).all()
    assert params[1] not in optimizer.state
    assert params[0].lt(1).all()


@pytest.mark.parametrize(("lr", "expected"), [(0.5, 0.02 / 0.5), (0.001, 1.0)])
def test_clip_caps_the_ratio_at_the_learning_rate(lr: float, expected: float):
    param = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    param.grad = torch.tensor([0.0, 0.25], dtype=torch.float64)
    optimizer = _larc([param], 0.0, lr=lr, clip=True, trust_coefficient=0.001, momentum=0, eps=0)
    optimizer.step()
    moved = torch.tensor([0.0, lr * expected * 0.25], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor([3.0, 4.0]).double() - param.detach(), moved)


def test_the_gradient_is_left_as_it_is():
    param = torch.ones(4, requires_grad=True)
    param.grad = torch.full((4,), 0.5)
    _larc([param], 0.1, lr=1.0).step()
    assert param.grad.eq(0.5).all()


def test_negative_settings_are_refused():
    with pytest.raises(ValueError, match="negative"):
        _larc([torch.ones(1, requires_grad=True)], -1.0)


def test_prototypes_are_a_group_of_their_own():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(3, 4)
            self.prototypes = nn.Linear(4, 5, bias=False)

    model = Model()
    others, prototypes = parameter_groups(model)
    assert [id(p) for p in others["params"]] == [id(model.trunk.weight), id(model.trunk.bias)]
    assert [id(p) for p in prototypes["params"]] == [id(model.prototypes.weight)]
    assert not others["frozen"]
    assert not prototypes["frozen"]


class Piece(NamedTuple):
    """A segment, and where it begins in the flattened parameter."""

    param_index: int
    offset: int
    length: int
    start: int

    @property
    def segment(self) -> Segment:
        return Segment(self.param_index, self.offset, self.length)


SHAPES = [(4, 3, 3), (7,), (1,), (5, 6), (2,)]


def _problem(seed: int, steps: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters and gradients; the second starts at zero, the third's gradient is zero."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    params[1].zero_()
    grads = [
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
        for _ in range(steps)
    ]
    for step in grads:
        step[2].zero_()
    return params, grads


def _whole(params: list[Tensor], grads: list[list[Tensor]]) -> list[Tensor]:
    params = [p.clone().requires_grad_() for p in params]
    optimizer = _larc(params, 1e-2, lr=0.7, trust_coefficient=0.02)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad
        optimizer.step()
    return [p.detach() for p in params]


def _lay_out(tensors: list[Tensor], segments: list[Piece], size: int, padding: float) -> Tensor:
    flat = torch.full((size,), padding, dtype=torch.float64)
    for index, offset, length, start in segments:
        flat[offset : offset + length] = tensors[index].flatten()[start : start + length]
    return flat


def _in_segments(
    params: list[Tensor],
    grads: list[list[Tensor]],
    segments: list[Piece],
    size: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    flat = _lay_out(params, segments, size, padding=9.0).requires_grad_()
    optimizer = _larc([flat], 1e-2, lr=0.7, trust_coefficient=0.02)
    optimizer.bind(
        {id(flat): SegmentTable(len(params), [each.segment for each in segments], group)}
    )
    for step in grads:
        flat.grad = _lay_out(step, segments, size, padding=5.0)
        optimizer.step()
    return flat.detach()


def _gather(flats: list[Tensor], segments: list[list[Piece]]) -> list[Tensor]:
    whole = [torch.full(shape, torch.nan, dtype=torch.float64).flatten() for shape in SHAPES]
    for flat, own in zip(flats, segments, strict=True):
        for index, offset, length, start in own:
            whole[index][start : start + length] = flat[offset : offset + length]
    return [values.view(shape) for values, shape in zip(whole, SHAPES, strict=True)]


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[list[Piece], int]:
    """Every parameter cut at random places, the pieces shuffled, with random gaps of padding."""
    pieces = []
    for index, shape in enumerate(SHAPES):
        numel = torch.Size(shape).numel()
        cuts = draw(st.lists(st.integers(0, numel), max_size=3))
        edges = [0, *sorted(cuts), numel]
        pieces += [(index, start, stop - start) for start, stop in pairwise(edges)]
    segments, offset = [], 0
    for index, start, length in draw(st.permutations(pieces)):
        offset += draw(st.integers(0, 2))
        segments.append(Piece(index, offset, length, start))
        offset += length
    return segments, offset + draw(st.integers(0, 3))


@settings(deadline=None, max_examples=50)
@given(layout=_layouts(), seed=st.integers(0, 2**32))
def test_any_layout_equals_whole_parameters(layout: tuple[list[Piece], int], seed: int):
    segments, size = layout
    params, grads = _problem(seed, steps=3)
    flat = _in_segments(params, grads, segments, size)
    for seen, expected in zip(_gather([flat], [segments]), _whole(params, grads), strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-13, atol=1e-14)
    padding = torch.ones(size, dtype=torch.bool)
    for segment in segments:
        padding[segment.offset : segment.offset + segment.length] = False
    assert flat[padding].eq(9).all()


def _cut_flat(cut: int, total: int) -> list[list[Piece]]:
    """What ZeRO does: all parameters end to end, cut at one place into two ranks' partitions."""
    ranks: list[list[Piece]] = [[], []]
    begin = 0
    for index, shape in enumerate(SHAPES):
        end = begin + torch.Size(shape).numel()
        for rank, (low, high) in enumerate([(0, cut), (cut, total)]):
            first, last = max(begin, low), min(end, high)
            if first < last:
                ranks[rank].append(Piece(index, first - low, last - first, first - begin))
        begin = end
    return ranks


def _rank_steps(cuts: list[int], total: int) -> list[Tensor]:
    params, grads = _problem(7, steps=4)
    own = [_cut_flat(cut, total)[dist.get_rank()] for cut in cuts]
    return [_in_segments(params, grads, s, total, dist.group.WORLD) for s in own]


@pytest.mark.dist
def test_two_ranks_equal_whole_parameters():
    total = sum(torch.Size(shape).numel() for shape in SHAPES)
    cuts = [total // 2, 20, 36, 43, total]  # inside and between parameters; nothing but padding
    by_rank = run_ranks(_rank_steps, 2, cuts, total)
    expected = _whole(*_problem(7, steps=4))
    for number, cut in enumerate(cuts):
        whole = _gather([flats[number] for flats in by_rank], _cut_flat(cut, total))
        for seen, target in zip(whole, expected, strict=True):
            torch.testing.assert_close(seen, target, rtol=1e-13, atol=1e-14)


def test_mixed_binding_is_refused():
    flats = [torch.ones(4, requires_grad=True) for _ in range(2)]
    optimizer = _larc(flats, 0.0)
    with pytest.raises(ValueError, match="wholly or not at all"):
        optimizer.bind({id(flats[0]): SegmentTable(1, [Segment(0, 0, 4)])})


def test_a_segment_of_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="outside 0 … 1"):
        SegmentTable(2, [Segment(2, 0, 4)])
