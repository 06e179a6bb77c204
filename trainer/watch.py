"""Reads what the loop logs and says what goes wrong, why most likely, and which setting to change.

Called by the loop on rank 0 with every logged record. Alarms go into the log and the metrics; none
of them stops a run. The rules are those of people whose runs went wrong (facebookresearch/swav
issues 12, 42, 62, 69, 71, 76, 88, lightly issue 1148); figures are those of `trainer.health`.

    stuck_at_chance      the loss stays at ln K: the model predicts all prototypes alike
    loss_not_falling     the loss stays above ln K: worse than that
    loss_rising          the loss has left its lowest level for good, without a queue
    queue_exploded       the same with the queue in use, or the loss leapt when it came into use
    queue_drift          queued features are out of date
    dead_prototypes      many prototypes are no sample's best
    duplicate_prototypes many prototypes can hardly be told apart
    collapsed_features   all images have nearly the same feature
    exploding_gradients  gradients have grown by orders of magnitude, or are not finite
    standing_weights     some parameter is so small against its gradient that LARC never moves it

Losses with and without a queue are not comparable, since the queue changes the codes: what counts
is whether the loss keeps rising from where it stood once the queue was in use.

Nothing is kept over a resume. A rule needs a cause that lasts, and compares a loss only with those
it has seen, so a resumed run is judged from the figures after its resume.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.health import HealthConfig

SOON = 0.1
"""Share of the patience that what shows at once must last, and over which a loss is averaged."""

MIN_RECORDS = 3
"""Records in a row that must show a cause, however many steps lie between them."""

MAX_WEIGHT = 0.2
"""Of one record in a mean, however many steps it stands for."""


@dataclass(frozen=True)
class Alarm:
    """`name` is the rule's; `message` says what is seen, the likely cause and what to change."""

    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


class Watch:
    """Judges the logged records of a run in the order of their steps."""

    def __init__(self, config: HealthConfig, *, num_prototypes: int) -> None:
        self._config = config
        self._trends = _Trends(config.patience_steps, chance=math.log(num_prototypes))
        self._bells = {rule.name: _Bell() for rule in _RULES}

    def judge(self, record: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that ring at this record: `step`, `loss`, `lr`, `queue_used`, `health/…`.

        A rule whose figures are missing stays silent. An alarm rings once; the same one rings again
        only after `quiet_steps` without cause.
        """
        self._trends.add(record)
        seen = _Seen(record, self._config, self._trends)
        return [
            Alarm(rule.name, message)
            for rule in _RULES
            if (message := self._rung(rule, seen)) is not None
        ]

    def _rung(self, rule: "_Rule", seen: "_Seen") -> str | None:
        config, message = self._config, rule.cause(seen)
        lasting = config.patience_steps if rule.is_slow else config.patience_steps * SOON
        rings = self._bells[rule.name].hear(
            seen.step, message is not None, lasting, config.quiet_steps
        )
        return message if rings else None


@dataclass
class _Bell:
    """Rings once for a cause that has lasted; again only after a silence."""

    since: int | None = None  # step of the first record in a row that shows the cause
    num_records: int = 0  # in that row
    last: int | None = None  # newest step of a cause that has lasted

    def hear(self, step: int, has_cause: bool, lasting_steps: float, quiet_steps: int) -> bool:
        if not has_cause:
            self.since, self.num_records = None, 0
            return False
        if self.since is None:
            self.since = step
        self.num_records += 1
        if self.num_records < MIN_RECORDS or step - self.since < lasting_steps:
            return False
        was_quiet = self.last is None or step - self.last > quiet_steps
        self.last = step
        return was_quiet


@dataclass
class _Mean:
    """The mean over about the last `span_steps`, of all values until there are as many."""

    span_steps: float
    value: float = math.nan
    num_values: int = 0

    def add(self, value: float, num_steps: int) -> None:
        self.num_values += 1
        weight = min(1 - math.exp(-num_steps / self.span_steps), MAX_WEIGHT)
        weight = max(weight, 1 / self.num_values)
        before = self.value if self.num_values > 1 else 0.0
        self.value = before + weight * (value - before)


class _Trends:
    """Means of the loss and of the logarithm of the largest gradient norm; bounded memory."""

    def __init__(self, patience_steps: int, *, chance: float) -> None:
        self.chance = chance
        self.loss_before_queue = math.nan
        self.lowest_ever = math.inf  # with and without a queue
        self._soon_steps = patience_steps * SOON
        self._start_loss()
        self._grad_lately = _Mean(self._soon_steps)
        self._grad_before = _Mean(patience_steps)
        self._step: int | None = None
        self._queue_used: bool | None = None

    @property
    def loss(self) -> float:
        return self._loss.value

    @property
    def grad_growth(self) -> float:
        """By how much gradient norms are larger lately than over the whole patience."""
        exponent = self._grad_lately.value - self._grad_before.value
        return math.exp(min(exponent, 700.0)) if self._grad_before.num_values else 1.0

    def add(self, record: Mapping[str, Any]) -> None:
        step, queue_used = record["step"], bool(record.get("queue_used"))
        num_steps = step - self._step if self._step is not None else 1
        if self._queue_used is not None and queue_used != self._queue_used:
            self.loss_before_queue = self.loss if queue_used else math.nan
            self._start_loss()
        self._step, self._queue_used = step, queue_used
        self._add_loss(record["loss"], num_steps)
        norm = record.get("health/grad_norm_max", math.nan)
        if 0 < norm < math.inf:
            for mean in (self._grad_lately, self._grad_before):
                mean.add(math.log(norm), num_steps)

    def _start_loss(self) -> None:
        self._loss = _Mean(self._soon_steps)
        self.lowest = math.inf

    def _add_loss(self, loss: float, num_steps: int) -> None:
        self._loss.add(loss, num_steps)
        if self._loss.num_values >= 1 / MAX_WEIGHT:  # a single loss may be low by chance
            self.lowest = min(self.lowest, self.loss)
            self.lowest_ever = min(self.lowest_ever, self.loss)


class _Seen:
    """What the rules look at."""

    def __init__(self, record: Mapping[str, Any], config: HealthConfig, trends: _Trends) -> None:
        self.config = config
        self.trends = trends
        self.step: int = record["step"]
        self.lr: float = record.get("lr", math.nan)
        self.queue_used = bool(record.get("queue_used"))
        self._record = record

    def __getitem__(self, figure: str) -> float:
        """A figure of trainer.health, NaN where it was not logged: no comparison with it holds."""
        return float(self._record.get(f"health/{figure}", math.nan))

    def has(self, figure: str) -> bool:
        """Whether a figure was logged."""
        return f"health/{figure}" in self._record

    @property
    def above_chance(self) -> float:
        """By how much the loss is above ln K, in margins around it."""
        return self._margins(self.trends.loss)

    @property
    def has_learned(self) -> bool:
        """Whether the loss was below ln K at some time."""
        return self._margins(self.trends.lowest_ever) < -1

    @property
    def has_leapt(self) -> bool:
        """Whether the queue took the loss from below ln K to above it."""
        return self._margins(self.trends.loss_before_queue) < -1 and self.above_chance > 1

    @property
    def has_risen(self) -> bool:
        """Whether the loss is far above its lowest, with and without the queue apart."""
        trends = self.trends
        return trends.loss - trends.lowest > self.config.max_loss_rise * trends.chance

    @property
    def has_stale_queue(self) -> bool:
        return self.queue_used and self["queue_drift"] > self.config.max_queue_drift

    @property
    def has_uniform_codes(self) -> bool:
        return self["code_entropy"] > self.config.max_code_entropy * self.trends.chance

    def _margins(self, loss: float) -> float:
        chance = self.trends.chance
        return (loss - chance) / (self.config.chance_margin * chance)


_NO_STEPS = "The learning rate is 0: set schedule.base_lr, and schedule.start_lr of a warm-up"

# The rules: what is seen and what to do about it, or None.


def _stuck_at_chance(seen: _Seen) -> str | None:
    if not abs(seen.above_chance) <= 1:
        return None
    return (
        f"the loss stays at {seen.trends.loss:.4f}, ln K being {seen.trends.chance:.4f}: the model "
        f"predicts all prototypes alike. {_why_at_chance(seen)}"
    )


def _why_at_chance(seen: _Seen) -> str:
    if seen.lr == 0:
        return _NO_STEPS
    if seen["feature_std"] < seen.config.min_feature_std:
        return (
            f"All images have nearly the same feature (health/feature_std "
            f"{seen['feature_std']:.2g}): lower sinkhorn.epsilon, lower schedule.base_lr, and keep "
            f"the prototypes as drawn for longer (schedule.freeze_prototypes_steps)"
        )
    if seen.has_uniform_codes:
        return (
            f"The codes are nearly uniform (health/code_entropy {seen['code_entropy']:.2f}) and "
            f"teach nothing: lower sinkhorn.epsilon"
        )
    return (
        "The codes tell images apart, but the model does not follow: keep the prototypes as drawn "
        "for longer (schedule.freeze_prototypes_steps), then change schedule.base_lr, lower first"
    )


def _loss_not_falling(seen: _Seen) -> str | None:
    if seen.has_learned or not seen.above_chance > 1:
        return None
    why = _NO_STEPS
    if seen.lr > 0:
        why = (
            f"Most likely the steps are too large: lower schedule.base_lr (now at {seen.lr:.3g}), "
            f"warm up for longer (schedule.warmup_epochs), or raise loss.temperature (0.1 in SwAV)"
        )
    return (
        f"the loss of {seen.trends.loss:.4f} has not come below ln K = {seen.trends.chance:.4f}: "
        f"predictions are worse than none. {why}"
    )


def _loss_rising(seen: _Seen) -> str | None:
    if seen.queue_used or not seen.has_risen:
        return None
    return (
        f"the loss has risen from {seen.trends.lowest:.4f} to {seen.trends.loss:.4f}. Most likely "
        f"the steps are too large: lower schedule.base_lr (now at {seen.lr:.3g}), warm up for "
        f"longer (schedule.warmup_epochs), or keep the prototypes as drawn for longer "
        f"(schedule.freeze_prototypes_steps)"
    )


def _queue_exploded(seen: _Seen) -> str | None:
    if not seen.queue_used or not (seen.has_risen or seen.has_leapt):
        return None
    before = seen.trends.loss_before_queue if seen.has_leapt else seen.trends.lowest
    drift = seen["queue_drift"]
    shown = "" if math.isnan(drift) else f" (health/queue_drift {drift:.2f})"
    return (
        f"the loss has risen from {before:.4f} to {seen.trends.loss:.4f} since the queue is in "
        f"use. Most likely its features are out of date{shown}: {_fresher_queue(seen)}"
    )


def _queue_drift(seen: _Seen) -> str | None:
    if not seen.has_stale_queue:
        return None
    return (
        f"a feature has lost {seen['queue_drift']:.0%} of what it says of its image by the time it "
        f"leaves the queue, and spoils the codes of new ones. The weights change too fast for this "
        f"queue: {_fresher_queue(seen)}"
    )


def _fresher_queue(seen: _Seen) -> str:
    return (
        f"start it later (queue.start_epoch, queue.start_step), at a lower rate "
        f"(schedule.base_lr, now at {seen.lr:.3g}), or make it shorter (queue.length)"
    )


def _dead_prototypes(seen: _Seen) -> str | None:
    if not seen["prototypes_used"] < seen.config.min_prototypes_used:
        return None
    return (
        f"only {seen['prototypes_used']:.0%} of the prototypes have been any image's best lately. "
        f"More prototypes than the data have kinds, or codes that are not balanced: raise "
        f"sinkhorn.num_iterations or sinkhorn.epsilon, keep the prototypes as drawn for longer "
        f"(schedule.freeze_prototypes_steps), or lower model.num_prototypes"
    )


def _duplicate_prototypes(seen: _Seen) -> str | None:
    if not seen["duplicate_prototypes"] > seen.config.max_duplicate_prototypes:
        return None
    return (
        f"{seen['duplicate_prototypes']:.0%} of the prototypes can hardly be told from another one "
        f"(largest cosine {seen['nearest_prototypes']:.4f}). Most likely they were trained before "
        f"features were spread out: keep them as drawn for longer "
        f"(schedule.freeze_prototypes_steps), lower schedule.base_lr or sinkhorn.epsilon, or lower "
        f"model.num_prototypes"
    )


def _collapsed_features(seen: _Seen) -> str | None:
    if not seen["feature_std"] < seen.config.min_feature_std:
        return None
    return (
        f"all images have nearly the same feature (health/feature_std {seen['feature_std']:.2g}, "
        f"1 when they are spread out). {_why_collapsed(seen)}"
    )


def _why_collapsed(seen: _Seen) -> str:
    if seen.has_stale_queue:
        return f"Most likely the queue's features are out of date: {_fresher_queue(seen)}"
    if seen.has_uniform_codes:
        return (
            "Most likely the codes are too soft to teach anything: lower sinkhorn.epsilon, then "
            "schedule.base_lr"
        )
    return (
        "Most likely the codes are not balanced, and all images get the same: raise "
        "sinkhorn.num_iterations (3 in SwAV), then lower schedule.base_lr"
    )


def _exploding_gradients(seen: _Seen) -> str | None:
    norm, growth = seen["grad_norm_max"], seen.trends.grad_growth
    if seen.has("grad_norm_max") and not math.isfinite(norm):
        what = f"the largest gradient norm of a parameter is {norm}"
    elif growth > seen.config.max_grad_growth:
        what = (
            f"the largest gradient norm of a parameter has grown {growth:.3g} times to {norm:.3g}"
        )
    else:
        return None
    return (
        f"{what}. Lower schedule.base_lr (now at {seen.lr:.3g}), warm up for longer "
        f"(schedule.warmup_epochs), set engine.gradient_clipping; under engine.precision=fp16 use "
        f"bf16 or fp32"
    )


def _standing_weights(seen: _Seen) -> str | None:
    if not seen["trust_ratio_min"] < seen.config.min_trust_ratio:
        return None
    return (
        f"the smallest trust ratio is {seen['trust_ratio_min']:.2g}: some parameter is so small "
        f"against its gradient that LARC does not move it. Most likely a bias or BatchNorm weight: "
        f"set optim.exclude_bias_and_norm=true; otherwise lower optim.weight_decay or raise "
        f"optim.trust_coefficient"
    )


class _Rule(NamedTuple):
    name: str
    cause: Callable[[_Seen], str | None]
    is_slow: bool  # whether the cause must last for all the patience


_RULES = (
    _Rule("stuck_at_chance", _stuck_at_chance, is_slow=True),
    _Rule("loss_not_falling", _loss_not_falling, is_slow=True),
    _Rule("loss_rising", _loss_rising, is_slow=False),
    _Rule("queue_exploded", _queue_exploded, is_slow=False),
    _Rule("queue_drift", _queue_drift, is_slow=False),
    _Rule("dead_prototypes", _dead_prototypes, is_slow=False),
    _Rule("duplicate_prototypes", _duplicate_prototypes, is_slow=False),
    _Rule("collapsed_features", _collapsed_features, is_slow=True),
    _Rule("exploding_gradients", _exploding_gradients, is_slow=False),
    _Rule("standing_weights", _standing_weights, is_slow=True),
)
