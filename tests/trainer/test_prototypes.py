"""Prototypes: normalised whole and in flat partitions, and left alone while frozen."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support import golden
from tests.support.processes import run_ranks
from trainer.loss import swav_loss
from trainer.optim import LARC, Segment, SegmentTable, normalize_rows, parameter_groups
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
def test_normalised_whole(dtype: torch.dtype):
    suffix, atol = TOLERANCES[dtype]
    weight = golden.tensor("prototypes", "norm__w", dtype).requires_grad_()
    normalize_rows(weight)
    _close(weight, f"norm__w_normalised_{suffix}", atol["norm"])


def _partition(cuts: list[int], rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, Segment]:
    """This rank's stretch of the matrix, after three numbers of padding and before two."""
    weight = golden.tensor("prototypes", "norm__w", dtype).flatten()
    start, stop = cuts[rank], cuts[rank + 1]
    padding = torch.full((3,), 7.0, dtype=dtype)
    flat = torch.cat([padding, weight[start:stop], padding[:2]])
    return flat, Segment(param_index=0, offset=3, length=stop - start, start=start)


def _rank_normalises(cuts: list[int], dtype: torch.dtype) -> torch.Tensor:
    flat, segment = _partition(cuts, dist.get_rank(), dtype)
    table = SegmentTable(1, [segment], dist.group.WORLD)
    normalize_rows(flat, shape=(12, 16), table=table)
    return flat


def _rank_normalises_all(all_cuts: list[list[int]]) -> dict:
    return {(i, d): _rank_normalises(c, d) for i, c in enumerate(all_cuts) for d in TOLERANCES}


@pytest.mark.dist
def test_normalised_in_partitions_with_rows_across_ranks():
    all_cuts = [[0, 100, 192], [0, 96, 192], [0, 0, 192], [0, 7, 192], [0, 191, 192]]
    by_rank = run_ranks(_rank_normalises_all, 2, all_cuts)
    for key in by_rank[0]:
        suffix, atol = TOLERANCES[key[1]]
        flats = [flats[key] for flats in by_rank]
        assert all(flat[:3].eq(7).all() and flat[-2:].eq(7).all() for flat in flats)
        whole = torch.cat([flat[3:-2] for flat in flats]).view(12, 16)
        _close(whole, f"norm__w_normalised_{suffix}", atol["norm"])


def test_normalised_in_several_segments_of_one_rank():
    weight = golden.tensor("prototypes", "norm__w", torch.float64).flatten()
    flat = torch.cat([weight[77:], torch.zeros(1), weight[:77]])
    table = SegmentTable(1, [Segment(0, 0, 115, 77), Segment(0, 116, 77, 0)])
    normalize_rows(flat, shape=(12, 16), table=table)
    whole = torch.cat([flat[116:], flat[:115]]).view(12, 16)
    _close(whole, "norm__w_normalised_f64", 1e-15)


def test_a_partition_needs_its_shape():
    with pytest.raises(ValueError, match="known shape"):
        normalize_rows(torch.zeros(4), table=SegmentTable(1, [Segment(0, 0, 4)]))


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
