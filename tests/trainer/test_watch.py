"""trainer.watch: every alarm rings, in runs that go wrong where that is cheap, and only then."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.trajectory import PlainNet
from trainer.engine import PlainEngine
from trainer.health import DriftProbe, Health, HealthConfig
from trainer.optim import LARC, parameter_groups
from trainer.queue import FeatureQueue
from trainer.step import swav_step
from trainer.watch import Alarm, Watch

NUM_PROTOTYPES = 20
CHANCE = math.log(NUM_PROTOTYPES)
BATCH_SIZE = 16


@dataclass(frozen=True)
class Training:
    """A run of a net with GroupNorm on noisy pictures of ten kinds, judged at every step."""

    num_steps: int = 150
    lr: float = 1.0
    epsilon: float = 0.05
    num_iterations: int = 3
    temperature: float = 0.1
    queue_length: int = 0
    queue_start: int = 0
    freeze_prototypes: bool = False
    change: Callable[[nn.Module], None] = lambda model: None  # of the initial weights
    patience_steps: int = 100

    def alarms(self) -> dict[str, Alarm]:
        """What rang in a run from the beginning."""
        run = _Run(self)
        return {alarm.name: alarm for alarm in run.go(self)}


class _Run:
    """Steps as `trainer.train` makes them."""

    def __init__(self, training: Training) -> None:
        torch.manual_seed(0)
        self._kinds = torch.randn(10, 3, 8, 8)
        self._model = PlainNet(c1=8, c2=16, hidden=32, feat_dim=16, num_prototypes=NUM_PROTOTYPES)
        training.change(self._model)
        self._optimizer = LARC(
            parameter_groups(self._model), lr=0.0, momentum=0.9, weight_decay=1e-6
        )
        self._engine = PlainEngine(self._model, self._optimizer)
        length = training.queue_length
        self._queue = FeatureQueue(length, 16, 2, batch_size=BATCH_SIZE, world_size=1)
        self._probe = DriftProbe(max(1, length // BATCH_SIZE), every_steps=1)
        self._health = Health()
        config = HealthConfig(patience_steps=training.patience_steps)
        self._watch = Watch(config, num_prototypes=NUM_PROTOTYPES)
        self._steps = itertools.count()

    def go(self, training: Training) -> list[Alarm]:
        """Train for as many steps as `training` says, in its settings; what rang."""
        steps = itertools.islice(self._steps, training.num_steps)
        return [alarm for step in steps for alarm in self._watch.judge(self._step(step, training))]

    def _step(self, step: int, training: Training) -> dict[str, Any]:
        images = self._kinds[torch.randint(10, (BATCH_SIZE,))].repeat(3, 1, 1, 1)
        images = images + 0.3 * torch.randn_like(images)
        queue = self._queue if step >= training.queue_start else None
        record = {"step": step, "lr": training.lr, "queue_used": bool(queue and queue.is_full)}
        result = swav_step(
            self._engine,
            [images],
            queue=queue,
            num_crops=3,
            crops_for_assign=(0, 1),
            temperature=training.temperature,
            epsilon=training.epsilon,
            num_iterations=training.num_iterations,
            lr=training.lr,
            freeze_prototypes=training.freeze_prototypes,
            observe=True,
        )
        self._probe.visit(step, images[:BATCH_SIZE], lambda some: self._model([some])[0])
        assert result.observed is not None
        figures = self._health.measure(
            result.observed, prototypes_KD=self._model.prototypes.weight.detach()
        )
        ranges = {f"health/{name}": value for name, value in self._optimizer.ranges().items()}
        figures |= self._probe.figures() | ranges | {"loss": result.loss}
        return record | {name: value.item() for name, value in figures.items()}


def test_a_run_that_learns_rings_nothing():
    assert Training(num_steps=250).alarms() == {}


def test_a_queue_that_starts_late_at_a_low_rate_rings_nothing():
    learning = Training(num_steps=200, queue_length=10 * BATCH_SIZE, queue_start=200)
    run = _Run(learning)
    assert run.go(learning) == []
    assert run.go(replace(learning, lr=0.05)) == []


def test_codes_that_are_too_soft():
    alarms = Training(num_steps=190, epsilon=10.0).alarms()
    stuck = alarms.pop("stuck_at_chance")
    assert "2.99" in stuck.message
    assert "sinkhorn.epsilon" in stuck.message
    assert alarms.keys() == {"collapsed_features"}
    assert "sinkhorn.epsilon" in alarms["collapsed_features"].message


def test_a_learning_rate_of_zero():
    alarms = Training(num_steps=60, lr=0.0, patience_steps=50).alarms()
    assert alarms.keys() == {"loss_not_falling"}
    assert "The learning rate is 0: set schedule.base_lr" in alarms["loss_not_falling"].message


def test_a_learning_rate_that_is_too_high():
    alarms = Training(num_steps=120, lr=100.0).alarms()
    assert {"loss_not_falling", "collapsed_features"} <= alarms.keys()
    assert "lower schedule.base_lr (now at 100)" in alarms["loss_not_falling"].message


def test_a_learning_rate_that_was_raised_too_far():
    run = _Run(Training())
    assert run.go(Training(num_steps=100)) == []
    alarms = {alarm.name: alarm for alarm in run.go(Training(num_steps=30, lr=100.0))}
    assert "lower schedule.base_lr (now at 100)" in alarms["loss_rising"].message
    assert alarms.keys().isdisjoint({"stuck_at_chance", "loss_not_falling", "queue_exploded"})


def test_a_queue_that_starts_early_at_a_high_rate():
    alarms = Training(num_steps=250, queue_length=20 * BATCH_SIZE, queue_start=80).alarms()
    assert {"queue_exploded", "queue_drift", "dead_prototypes"} <= alarms.keys()
    assert "loss_rising" not in alarms
    for name in ("queue_exploded", "queue_drift"):
        for setting in ("queue.start_step", "schedule.base_lr, now at 1", "queue.length"):
            assert setting in alarms[name].message
    assert "(health/queue_drift 0." in alarms["queue_exploded"].message


def test_codes_that_are_not_balanced():
    alarms = Training(num_steps=100, num_iterations=0, patience_steps=50).alarms()
    assert alarms.keys() == {"dead_prototypes", "collapsed_features"}
    for alarm in alarms.values():
        assert "sinkhorn.num_iterations" in alarm.message


def test_prototypes_that_are_alike():
    def repeat(model: nn.Module) -> None:
        with torch.no_grad():
            model.prototypes.weight.copy_(model.prototypes.weight[:5].repeat(4, 1))

    alarms = Training(num_steps=20, freeze_prototypes=True, change=repeat).alarms()
    assert "duplicate_prototypes" in alarms
    assert "schedule.freeze_prototypes_steps" in alarms["duplicate_prototypes"].message


def test_a_weight_that_larc_cannot_move():
    def shrink(model: nn.Module) -> None:
        nn.init.constant_(model.conv1.bias, 1e-12)

    alarms = Training(num_steps=60, change=shrink, patience_steps=50).alarms()
    assert alarms.keys() == {"standing_weights"}
    assert "optim.exclude_bias_and_norm=true" in alarms["standing_weights"].message


def test_gradients_that_explode():
    """Gradients are proportional to 1 / temperature."""
    run = _Run(Training())
    assert run.go(Training(num_steps=100)) == []
    alarms = {a.name: a for a in run.go(Training(num_steps=20, temperature=1e-5, lr=1e-9))}
    assert "engine.gradient_clipping" in alarms["exploding_gradients"].message


# Records of runs that were never trained.


def stream(num_records: int, *, every: int = 10, first: int = 0, **figures: Any) -> Iterator[Any]:
    """Records of a run that is well, changed by `figures`: values, or functions of the step."""
    for step in range(first, first + num_records * every, every):
        record = {"step": step, "loss": 5.0 - 2.0 * min(1, step / 5000), "lr": 0.6}
        record |= {"queue_used": False, "health/feature_std": 0.9, "health/code_entropy": 4.0}
        record |= {"health/prototypes_used": 0.95, "health/duplicate_prototypes": 0.01}
        record |= {"health/nearest_prototypes": 0.8, "health/queue_drift": 0.05}
        record |= {"health/grad_norm_max": 0.5, "health/trust_ratio_min": 1e-4}
        for name, value in figures.items():
            key = name if name in ("loss", "lr", "queue_used") else f"health/{name}"
            record[key] = value(step) if callable(value) else value
        yield record


def rung(*streams: Iterator[Any], config: HealthConfig | None = None) -> list[tuple[int, str]]:
    watch = Watch(config or HealthConfig(), num_prototypes=300)
    records = itertools.chain(*streams)
    return [(record["step"], alarm.name) for record in records for alarm in watch.judge(record)]


def noisy(step: int) -> float:
    """Between -1 and 1, the same for the same step."""
    return math.sin(step * step)


def test_a_long_healthy_run_rings_nothing():
    loss = lambda step: 5.0 - 2.0 * min(1, step / 5000) + 0.2 * noisy(step)  # noqa: E731
    assert rung(stream(12_000, loss=loss)) == []


def test_a_queue_whose_codes_change_the_loss_rings_nothing():
    """Losses with and without a queue are not comparable: a leap below chance is no explosion."""

    def loss(step: int) -> float:
        return (4.0 if step < 5000 else 5.2) + 0.1 * noisy(step)

    assert rung(stream(2000, loss=loss, queue_used=lambda step: step >= 5000)) == []


def test_a_queue_that_takes_the_loss_above_chance_explodes():
    def loss(step: int) -> float:
        return 5.0 if step < 5000 else 6.0

    found = rung(stream(600, loss=loss, queue_used=lambda step: step >= 5000))
    assert found == [(5100, "queue_exploded")]


def test_a_loss_that_rises_on_with_a_queue_explodes_in_time():
    def loss(step: int) -> float:
        return 4.0 + max(0, step - 5000) / 1000 + 0.1 * noisy(step)

    (found,) = rung(stream(700, loss=loss, queue_used=lambda step: step >= 5000))
    assert found[1] == "queue_exploded"
    assert 5285 < found[0] < 5700  # 5 % of ln 300 is 0.285


def test_drift_counts_only_with_a_queue():
    assert rung(stream(500, queue_drift=0.9)) == []
    assert rung(stream(500, queue_drift=0.9, queue_used=True)) == [(100, "queue_drift")]


def test_an_alarm_does_not_repeat_until_it_was_quiet():
    def drift(step: int) -> float:
        return 0.05 if 20_000 <= step < 22_000 or 30_000 <= step < 36_000 else 0.9

    found = rung(stream(12_000, queue_used=True, queue_drift=drift))
    assert found == [(100, "queue_drift"), (36_100, "queue_drift")]


def test_a_cause_that_passes_rings_nothing():
    found = rung(
        stream(
            3000,
            queue_used=True,
            queue_drift=lambda step: 0.9 if step % 200 < 90 else 0.1,
            feature_std=lambda step: 0.01 if step < 900 else 0.5,
            grad_norm_max=lambda step: math.inf if step % 100 < 20 else 0.5,
        )
    )
    assert found == []


def test_gradients_that_are_not_finite():
    found = rung(stream(20, grad_norm_max=lambda step: math.nan if step >= 50 else 0.5))
    assert found == [(150, "exploding_gradients")]


def test_records_far_apart_take_three_to_ring():
    assert rung(stream(5, every=2000, feature_std=0.01)) == [(4000, "collapsed_features")]


@pytest.mark.parametrize("queue_used", [False, True])
@pytest.mark.parametrize("loss", [3.0, 5.6])
def test_a_resumed_run_rings_nothing(loss: float, queue_used: bool):
    found = rung(stream(500, first=60_000, loss=loss, queue_used=queue_used))
    assert found == []


def test_a_record_without_figures_rings_nothing():
    watch = Watch(HealthConfig(), num_prototypes=300)
    for step in range(0, 5000, 10):
        assert watch.judge({"step": step, "loss": 4.0}) == []


def test_how_an_alarm_is_written():
    assert str(Alarm("queue_drift", "stale")) == "queue_drift: stale"
