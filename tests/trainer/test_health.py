"""trainer.health: figures of tensors whose answer is known, and of two ranks against one."""

import math

import pytest
import torch
import torch.distributed as dist

from tests.support.processes import run_ranks
from trainer import health
from trainer.health import DriftProbe, Health, Observed, drift
from trainer.sinkhorn import sinkhorn


def seen(
    codes: torch.Tensor | None = None,
    *,
    scores: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
    loss: float = 1.0,
) -> Observed:
    """A step of two images, two crops and four prototypes, unless told otherwise."""
    codes = torch.eye(4).view(2, 2, 4) if codes is None else codes
    return Observed(
        features_VBD=torch.eye(2).repeat(2, 1, 1) if features is None else features,
        scores_VBK=torch.zeros(2, *codes.shape[1:]) if scores is None else scores,
        codes_ABK=codes,
        crops_for_assign=tuple(range(len(codes))),
        loss=torch.tensor(loss),
    )


def measure(observed: Observed, prototypes: torch.Tensor | None = None) -> dict[str, float]:
    """The figures of a single step, without their prefix."""
    num_prototypes = observed.codes_ABK.shape[-1]
    return plain(
        Health(), observed, torch.eye(num_prototypes) if prototypes is None else prototypes
    )


def plain(each: Health, observed: Observed, prototypes: torch.Tensor) -> dict[str, float]:
    figures = each.measure(observed, prototypes_KD=prototypes)
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in figures.values())
    return {name.removeprefix("health/"): value.item() for name, value in figures.items()}


@pytest.mark.parametrize(
    ("row", "entropy"),
    [
        ([1.0, 0.0, 0.0, 0.0], 0.0),
        ([0.25] * 4, math.log(4)),
        ([0.5, 0.5, 0.0, 0.0], math.log(2)),
        ([0.05, 0.05, 0.0, 0.0], math.log(2)),  # without Sinkhorn iterations no row sums to one
        ([0.0] * 4, 0.0),  # nor keeps anything, if its image is far from all others
    ],
)
def test_entropy_of_codes(row: list[float], entropy: float):
    assert measure(seen(torch.tensor([[row]])))["code_entropy"] == pytest.approx(entropy)


def test_distance_to_chance():
    assert measure(seen(loss=1.25))["loss_below_chance"] == pytest.approx(math.log(4) - 1.25)


def test_agreement_counts_the_pairs_of_the_loss():
    best = torch.tensor([[0, 1], [2, 1], [0, 1]])  # of three crops, two images; codes for two
    codes = torch.eye(4)[torch.tensor([[0, 3], [2, 1]])]
    # Pairs (code of crop 0; crops 1, 2) and (code of crop 1; crops 0, 2), image by image:
    # 0 ≠ 2, 0 = 0, 3 ≠ 1, 3 ≠ 1 and 2 ≠ 0, 2 ≠ 0, 1 = 1, 1 = 1.
    observed = seen(codes, scores=torch.eye(4)[best], features=torch.eye(2).repeat(3, 1, 1))
    assert measure(observed)["crop_agreement"] == pytest.approx(3 / 8)


def test_spread_of_features_is_1_over_the_sphere_and_0_in_a_point():
    torch.manual_seed(0)
    sphere = torch.nn.functional.normalize(torch.randn(2, 4096, 32), dim=-1)
    codes = torch.full((2, 4096, 4), 0.25)
    assert measure(seen(codes, features=sphere))["feature_std"] == pytest.approx(1, abs=0.01)
    point = sphere[:, :1].expand(-1, 4096, -1)[[0, 0]]
    assert measure(seen(codes, features=point))["feature_std"] < 1e-6
    halves = torch.cat([sphere[:, :2048], point[:, :2048]], dim=1)
    assert 0.5 < measure(seen(codes, features=halves))["feature_std"] < 0.9


def test_only_assigned_crops_are_looked_at_for_the_spread():
    features = torch.stack([torch.eye(2), torch.ones(2, 2) / math.sqrt(2)])
    codes = torch.full((1, 2, 4), 0.25)
    std = measure(seen(codes, features=features))["feature_std"]
    assert std == pytest.approx(math.sqrt(0.25) * math.sqrt(2))


def test_nearest_and_duplicate_prototypes():
    angles = torch.tensor([0.0, 0.1, 1.0, 2.0])  # cos 0.1 = 0.995
    prototypes = 3 * torch.stack([angles.cos(), angles.sin()], dim=1)
    figures = measure(seen(), prototypes)
    assert figures["nearest_prototypes"] == pytest.approx(math.cos(0.1))
    assert figures["duplicate_prototypes"] == 0.5
    opposite = measure(seen(torch.eye(2)[None]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert (opposite["nearest_prototypes"], opposite["duplicate_prototypes"]) == (-1, 0)


def test_every_prototype_is_compared_once_in_a_rotation(monkeypatch: pytest.MonkeyPatch):
    """With two rows compared a step, seven prototypes take four steps, in two blocks each."""
    monkeypatch.setattr(health, "MAX_COMPARED", 2)
    monkeypatch.setattr(health, "_MAX_COSINES", 7)
    codes = torch.full((2, 2, 7), 1 / 7)
    for first in range(7):
        prototypes = torch.eye(7)
        prototypes[(first + 3) % 7] = prototypes[first]
        rotating = Health()
        for _ in range(4):
            figures = plain(rotating, seen(codes), prototypes)
        assert figures["nearest_prototypes"] == 1
        assert 2 / 8 <= figures["duplicate_prototypes"] <= 3 / 8  # eight rows, one of them twice
        for _ in range(4):
            figures = plain(rotating, seen(codes), torch.eye(7))
        assert figures["nearest_prototypes"] == figures["duplicate_prototypes"] == 0


def test_a_prototype_is_dead_when_it_was_nobodys_best_for_a_window(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(health, "MIN_WINDOW", 2)
    each = Health()  # four samples a step: 10 · 4 prototypes are seen in ten steps
    codes = torch.eye(4)
    some = seen(codes[torch.tensor([[0, 1], [0, 1]])])
    other = seen(codes[torch.tensor([[2, 2], [2, 2]])])
    used = [plain(each, some, codes)["prototypes_used"] for _ in range(12)]
    assert used == [1] * 9 + [0.5] * 3
    assert plain(each, other, codes)["prototypes_used"] == 0.75
    used = [plain(each, other, codes)["prototypes_used"] for _ in range(10)]
    assert used == [0.75] * 8 + [0.25] * 2


def test_a_large_batch_still_gives_a_prototype_ten_steps():
    each = Health()
    one = seen(torch.eye(4)[torch.zeros(2, 500, dtype=torch.long)])
    used = [plain(each, one, torch.eye(4))["prototypes_used"] for _ in range(10)]
    assert used == [1] * 9 + [0.25]


def test_drift_is_0_for_the_same_features_and_1_for_those_of_other_images():
    torch.manual_seed(0)
    stored = torch.nn.functional.normalize(torch.randn(32, 64), dim=1)
    assert drift(stored, stored).item() == pytest.approx(0, abs=1e-6)
    others = torch.nn.functional.normalize(torch.randn(32, 64), dim=1)
    assert drift(stored, others).item() == pytest.approx(1, abs=0.1)
    shared = torch.nn.functional.normalize(torch.ones(64), dim=0)
    for weight in (0.0, 3.0):  # the same drift of features that point the same way, within 5 %
        then = torch.nn.functional.normalize(stored + weight * shared, dim=1)
        now = torch.nn.functional.normalize(stored + 0.5 * others + weight * shared, dim=1)
        assert drift(then, now).item() == pytest.approx(0.106, rel=0.05)


def test_a_probe_waits_for_the_age_of_the_queue():
    def encode(images: torch.Tensor) -> torch.Tensor:
        encoded.append(step)
        turned = images.flatten(1) + angle
        return torch.cat([turned.cos(), turned.sin()], dim=1)

    probe = DriftProbe(3, every_steps=1)
    encoded: list[int] = []
    found = []
    images = torch.tensor([0.0, 0.5, 2.0]).view(3, 1, 1, 1)
    for step in range(7, 26):
        angle = 0.1 * step
        probe.visit(step, images, encode)
        images = images.roll(1, dims=0)  # every batch has other images
        found.append(probe.figures().get("health/queue_drift"))
    assert encoded == [7, 10, 22, 25]  # a probe in five ages of the queue
    assert found[:3] == [None] * 3
    mean = sum(math.cos(a - b + 0.3) for a in (0, 0.5, 2) for b in (0, 0.5, 2) if a != b) / 6
    expected = (1 - math.cos(0.3)) / (1 - mean)
    assert [value.item() for value in found[3:]] == pytest.approx([expected] * 16, rel=1e-4)


def test_a_probe_is_not_made_more_often_than_figures_are_logged():
    def encode(images: torch.Tensor) -> torch.Tensor:
        encoded.append(step)
        return images

    encoded: list[int] = []
    probe = DriftProbe(1, every_steps=10)
    for step in range(12):
        probe.visit(step, torch.eye(4), encode)
    assert encoded == [0, 1, 10, 11]


def test_a_probe_keeps_its_images_though_the_batch_is_written_over():
    probe = DriftProbe(1, every_steps=1)
    images = torch.eye(4).view(4, 1, 1, 4).clone()
    probe.visit(0, images, lambda x: x.flatten(1))
    images.zero_()
    probe.visit(1, images, lambda x: x.flatten(1))
    assert probe.figures()["health/queue_drift"] == 0


def test_one_image_is_not_probed():
    probe = DriftProbe(1, every_steps=1)
    for step in range(4):
        probe.visit(step, torch.zeros(1, 3, 4, 4), lambda x: pytest.fail("encoded"))
    assert probe.figures() == {}
    with pytest.raises(ValueError, match="at least one step"):
        DriftProbe(0, every_steps=1)


def _steps() -> list[tuple[Observed, torch.Tensor]]:
    """Eight steps of 8 images, 4 crops, 40 prototypes, with codes for crops 0 and 2."""
    torch.manual_seed(3)
    steps = []
    for number in range(8):
        features = torch.nn.functional.normalize(torch.randn(4, 8, 16), dim=-1)
        prototypes = torch.nn.functional.normalize(torch.randn(40, 16), dim=1)
        scores = features @ prototypes.T
        codes = torch.stack([sinkhorn(scores[v], epsilon=0.05, num_iterations=3) for v in (0, 2)])
        loss = torch.tensor(3.0 + number)
        steps.append((Observed(features, scores, codes, (0, 2), loss), prototypes))
    return steps


def _figures(rank: int, world_size: int) -> list[list[float]]:
    """What a rank finds, which has its part of every batch."""
    group = dist.group.WORLD if world_size > 1 else None
    each = Health()
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    found = []
    for whole, prototypes in _steps():
        part = Observed(
            whole.features_VBD[:, mine],
            whole.scores_VBK[:, mine],
            whole.codes_ABK[:, mine],
            whole.crops_for_assign,
            whole.loss + (rank - 0.5 if world_size > 1 else 0),
        )
        figures = each.measure(part, prototypes_KD=prototypes, group=group)
        found.append([value.item() for value in figures.values()])
    stored, fresh = (step.features_VBD[0, mine] for step, _ in _steps()[:2])
    fresh = torch.nn.functional.normalize(stored + fresh, dim=1)
    found.append([drift(stored, fresh, group).item()])
    return found


def _rank_figures() -> list[list[float]]:
    health.MAX_COMPARED = 10  # 40 prototypes: two steps for two ranks
    return _figures(dist.get_rank(), 2)


@pytest.mark.dist
def test_two_ranks_find_what_one_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "MAX_COMPARED", 20)
    alone = _figures(0, 1)
    first, second = run_ranks(_rank_figures, 2)
    assert first == second
    for found, expected in zip(first, alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
