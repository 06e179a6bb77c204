"""LARC and prototypes under every ZeRO stage against one process with the whole batch.

One launch a world size works through all cases: ten steps each, prototypes frozen for the first
three and normalised before every step. The prototypes are large enough that stage 3 keeps them
divided, and their rows straddle ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import load_config
from pipeline.errors import ConfigError
from tests.support.processes import run_ranks
from tests.support.trajectory import masters, this_world
from trainer.config import Config
from trainer.engine import DeepSpeedEngine, Engine, EngineConfig, PlainEngine
from trainer.models.batchnorm import paused_statistics
from trainer.optim import LARC, parameter_groups

STEPS, FROZEN_STEPS, BATCH = 10, 3, 16
NUM_PROTOTYPES, FEAT_DIM = 1031, 99  # more than the 100,000 elements that stage 3 leaves whole
CLIPPING = 0.05  # the gradients' norms are some tenths


class Net(nn.Module):
    """Kernels, biases, normalisation and a head; no sizes that ranks divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 7, 3, stride=2),
            nn.GroupNorm(1, 7),
            nn.ReLU(),
            nn.Conv2d(7, 13, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(13 * 9, FEAT_DIM),
        )
        self.prototypes = nn.Linear(FEAT_DIM, NUM_PROTOTYPES, bias=False)

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        features = nn.functional.normalize(self.trunk(torch.cat(list(crops))), dim=1)
        return features, self.prototypes(features)


@dataclass(frozen=True)
class Case:
    """An engine's settings and the optimiser's scope."""

    engine: EngineConfig
    exclude: bool = False

    @property
    def name(self) -> str:
        changed = {k: v for k, v in vars(self.engine).items() if v != getattr(EngineConfig(), k)}
        words = [f"{key}={value}" for key, value in changed.items()]
        return " ".join([*words, *(["exclude"] if self.exclude else [])]) or "plain"


def cases() -> list[Case]:
    found = []
    for stage in range(4):
        plain = EngineConfig(zero_stage=stage)
        varied = [
            plain,
            replace(plain, accumulation_steps=2),
            replace(plain, gradient_clipping=CLIPPING),
        ]
        if stage:
            varied.append(replace(plain, overlap_communication=True))
            varied.append(replace(plain, offload="cpu"))
            everything = {"accumulation_steps": 2, "gradient_clipping": CLIPPING, "offload": "cpu"}
            varied.append(replace(plain, **everything))  # type: ignore[arg-type]
        found += [Case(each) for each in varied]
        found += [Case(plain, exclude=True), Case(varied[-1], exclude=True)]
    return found


NAMES = [case.name for case in cases()]


def optimizer_of(net: nn.Module, case: Case) -> LARC:
    groups = parameter_groups(net, exclude_bias_and_norm=case.exclude)
    return LARC(groups, lr=0.0, momentum=0.9, weight_decay=1e-2, trust_coefficient=0.02)


def images_and_labels(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator)
    return images, torch.randint(0, NUM_PROTOTYPES, (BATCH,), generator=generator)


def train(engine: Engine, mine: slice) -> None:
    """Ten steps on a rank's part of every batch."""
    for step in range(STEPS):
        engine.normalize_prototypes()
        images, labels = (each[mine] for each in images_and_labels(step))
        parts = engine.accumulation_steps
        for part, label in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            _, scores = engine.forward([part])
            assert engine.prototypes().shape == (NUM_PROTOTYPES, FEAT_DIM)  # as a queue asks
            engine.backward(nn.functional.cross_entropy(10 * scores, label))
        engine.step(lr=0.5, freeze_prototypes=step < FROZEN_STEPS)


def alone(case: Case) -> dict[str, Tensor]:
    """What one process makes of the whole batches."""
    net = Net()
    engine = PlainEngine(
        net,
        optimizer_of(net, case),
        accumulation_steps=case.engine.accumulation_steps,
        gradient_clipping=case.engine.gradient_clipping,
    )
    train(engine, slice(None))
    engine.normalize_prototypes()
    return masters(engine)


def error(seen: Tensor, expected: Tensor) -> float:
    """The largest difference, of numbers of order one or in proportion to larger ones."""
    scale = max(1.0, expected.abs().max().item())
    return (seen - expected).abs().max().item() / scale


def observe() -> dict[str, Any]:
    """On one rank: for every case, how far it is from one process, and what the engine shows."""
    rank, world_size = this_world().rank, dist.get_world_size()
    mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    references: dict[Any, dict[str, Tensor]] = {}
    found = {}
    for case in cases():
        key = case.engine.accumulation_steps, case.engine.gradient_clipping, case.exclude
        if key not in references:
            references[key] = alone(case)
        expected = references[key]
        net = Net()
        engine = DeepSpeedEngine(net, optimizer_of(net, case), case.engine)
        train(engine, mine)
        engine.normalize_prototypes()
        seen, before = masters(engine), dict(Net().named_parameters())
        images, _ = images_and_labels(0)
        with torch.no_grad(), paused_statistics(net):
            features, scores = engine.forward([images])
        found[case.name] = {
            "errors": {n: error(seen[n], expected[n]) for n in expected},
            "moved": {n: (expected[n] - before[n]).abs().max().item() for n in expected},
            "lengths": (seen["prototypes.weight"].norm(dim=1) - 1).abs().max().item(),
            "published": (features @ seen["prototypes.weight"].T - scores).abs().max().item(),
            "gathered": torch.equal(engine.prototypes(), seen["prototypes.weight"]),
            "ranges": {name: value.item() for name, value in engine.optimizer.ranges().items()},
        }
    return found


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    return {world_size: run_ranks(observe, world_size) for world_size in (2, 4)}


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(ranks, name, world_size):
    for found in ranks[world_size]:
        assert max(found[name]["errors"].values()) < 1e-6, found[name]["errors"]
        assert min(found[name]["moved"].values()) > 1e-3


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_prototypes_have_length_one_in_the_masters_and_in_the_module(ranks, name, world_size):
    for found in ranks[world_size]:
        assert found[name]["lengths"] < 1e-6
        assert found[name]["published"] < 1e-5
        assert found[name]["gathered"]


@pytest.mark.dist
@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_on_what_the_optimizer_shows(ranks, name):
    for world_size in ranks:
        first, *others = (found[name]["ranges"] for found in ranks[world_size])
        assert 0 < first["grad_norm_min"] < first["grad_norm_max"]
        assert 0 < first["trust_ratio_min"] < first["trust_ratio_max"]
        assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.round_robin_gradients=true"], "LARC would scale parameters by each other's norm"),
        (["engine.offload=cpu"], "stage 0 has no masters"),
        (["engine.precision=fp16", "engine.gradient_clipping=1.0"], "not supported with precision"),
        (["engine.zero_stage=3", "engine.compile=true"], "not supported with zero_stage=3"),
        (["engine.zero_stage=4"], "engine.zero_stage"),
        (["engine.precision=fp8"], "fp32, bf16, fp16"),
    ],
)
def test_what_does_not_work_is_refused_with_the_reason(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(Config, None, ["loader.dataset=x", "checkpoint.run=y", *overrides])
