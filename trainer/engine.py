"""Turns a loss into a step of the optimiser on every rank. The only file that knows DeepSpeed.

`trainer.step` drives an `Engine`; `trainer.checkpoint` reads and writes the training state through
its fragments. Two engines keep the same promises:

    PlainEngine      a module and a LARC optimiser, any dtype; averages gradients itself. The
                     golden float64 runs go through it.
    DeepSpeedEngine  the same under DeepSpeed, float32 or bfloat16: ZeRO stage 0 (everything on
                     every rank) or 1 (float32 masters and momentum divided over the ranks).

Source of the ZeRO internals used here: deepspeed 0.19, runtime/zero/stage_1_and_2.py and
utils/tensor_fragment.py (`_hp_mapping`: which slice of a parameter lies where in this rank's flat
master).

What a caller would trip over in DeepSpeed, settled here once: its optimiser sees flat partitions,
so LARC is bound to the parameters in them; gradient clipping is on by default; `bf16.enabled`
rounds the parameters themselves, so autocast over float32 parameters is used; its logger writes to
stdout.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from trainer.optim import LARC, Segment, SegmentTable, normalize_rows


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Section `engine`: how a step is spread over the ranks, and in which numbers."""

    # What is divided over the ranks: 1 masters and momentum, 2 gradients too, 3 weights too.
    zero_stage: Annotated[int, Ge(0), Le(3)] = 0
    precision: str = "fp32"  # or bf16, fp16: convolutions and linear layers in half precision
    accumulation_steps: Annotated[int, Gt(0)] = 1  # parts in which a rank's batch is computed
    gradient_clipping: Annotated[float, Ge(0)] = 0.0  # norm over all parameters; 0: none
    offload: str = "none"  # or cpu: masters and momentum in host memory, from stage 1 on
    overlap_communication: bool = False  # sum gradients while others are computed; more memory
    channels_last: bool = True  # memory format of images and activations
    compile: bool = False  # the trunk through torch.compile

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.offload not in ("none", "cpu"):
            raise ValueError(f"offload is none or cpu, got {self.offload!r}")
        if self.offload == "cpu" and not self.zero_stage:
            raise ValueError("offload=cpu needs zero_stage 1, 2 or 3: stage 0 has no masters")


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's elements, with its momentum, as this rank holds them.

    `weight` and `momentum` are flat views of equal length into the optimiser's own memory: what is
    written there is the new state. They hold elements `start` … of the flattened parameter, whose
    shape is `shape`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weight: Tensor
    momentum: Tensor


class Engine(Protocol):
    """What the step and the checkpoint need of a way to train."""

    module: nn.Module
    optimizer: LARC
    replicated: bool  # whether every rank holds every fragment whole

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Features [V*B, D] and scores [V*B, K] of a list of crops [V_g*B, 3, s, s], crop-major."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean of all ranks' losses."""

    def step(self, *, lr: float, freeze_prototypes: bool) -> None:
        """One step of the optimiser; frozen prototypes keep weight and momentum."""

    def normalize_prototypes(self) -> None:
        """Scale every prototype to length 1, in the optimiser's weights as in the module's."""

    def fragments(self) -> list[Fragment]:
        """The weights and momenta this rank holds."""

    def publish(self) -> None:
        """Make the module's weights those of the fragments, after these were written."""


class PlainEngine:
    """The step without DeepSpeed, in the module's own dtype.

    `optimizer` is built from `trainer.optim.parameter_groups(module)`; `group` are the ranks whose
    gradients are averaged, None for this process alone.
    """

    replicated = True

    def __init__(
        self, module: nn.Module, optimizer: LARC, group: dist.ProcessGroup | None = None
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self._group = group
        self._prototype_group = _prototype_group(module, optimizer)
        _start_momentum(optimizer)

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See Engine."""
        features, scores = self.module(crops)
        return features, scores

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        loss.backward()  # type: ignore[no-untyped-call]
        if self._group is None:
            return
        world_size = dist.get_world_size(self._group)
        for parameter in self.module.parameters():
            assert parameter.grad is not None, "every parameter takes part in the loss"
            dist.all_reduce(parameter.grad, group=self._group)
            parameter.grad /= world_size

    def step(self, *, lr: float, freeze_prototypes: bool) -> None:
        """See Engine."""
        _set_step(self.optimizer, self._prototype_group, lr, freeze_prototypes)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def normalize_prototypes(self) -> None:
        """See Engine."""
        normalize_rows(_prototypes(self.module))

    def fragments(self) -> list[Fragment]:
        """See Engine."""
        return _whole_fragments(self.module, self.optimizer)

    def publish(self) -> None:
        """See Engine. The optimiser works on the module's own parameters."""


class DeepSpeedEngine:
    """The step under DeepSpeed, ZeRO stage 0 or 1, over float32 parameters.

    `module` lies on this rank's device with contiguous float32 parameters, all in `optimizer`,
    which is built from `trainer.optim.parameter_groups(module)`. The world must have been started
    (trainer.distributed).
    """

    def __init__(self, module: nn.Module, optimizer: LARC, config: EngineConfig) -> None:
        self._prototype_group = _prototype_group(module, optimizer)
        self._deepspeed = _initialize(module, optimizer, config)
        self.module = module
        self.optimizer = optimizer
        self.replicated = config.zero_stage == 0
        if not self.replicated:
            optimizer.bind(_segment_tables(self._deepspeed.optimizer))
        _start_momentum(optimizer)

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See Engine. In bf16 under autocast, except where the model turns that off."""
        features, scores = self._deepspeed(crops)
        return features, scores

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        self._deepspeed.backward(loss)

    def step(self, *, lr: float, freeze_prototypes: bool) -> None:
        """See Engine."""
        _set_step(self.optimizer, self._prototype_group, lr, freeze_prototypes)
        self._deepspeed.step()

    def normalize_prototypes(self) -> None:
        """See Engine.

        Under stage 1 the module's weight is, bit for bit, the masters of all ranks put together. So
        every rank normalises it whole and copies its own part back to its master: rows that
        straddle ranks need no sum. Without the copy the next step would undo the normalisation.
        """
        weight = _prototypes(self.module)
        normalize_rows(weight)
        if not self.replicated and (mapping := _mapping(weight)) is not None:
            mapping.update_hp()

    def fragments(self) -> list[Fragment]:
        """See Engine. Stage 1: this rank's part of the flat float32 masters."""
        if self.replicated:
            return _whole_fragments(self.module, self.optimizer)
        return list(_partition_fragments(self.module, self._deepspeed.optimizer))

    def publish(self) -> None:
        """See Engine. Stage 1: every rank's masters are gathered into the module."""
        if not self.replicated:
            self._deepspeed.optimizer.update_lp_params()


def _prototypes(module: nn.Module) -> nn.Parameter:
    weight: nn.Parameter = module.get_parameter("prototypes.weight")
    return weight


def _prototype_group(module: nn.Module, optimizer: LARC) -> dict[str, Any]:
    """The group that can be frozen: the dict stays when DeepSpeed replaces the tensors in it."""
    group = optimizer.param_groups[-1]
    held = [id(parameter) for each in optimizer.param_groups for parameter in each["params"]]
    assert [id(p) for p in group["params"]] == [id(_prototypes(module))], "a group of their own"
    assert sorted(held) == sorted(id(p) for p in module.parameters()), "all, and no others"
    assert all(p.is_contiguous() for p in module.parameters()), "fragments are flat views"
    return group


def _set_step(optimizer: LARC, prototype_group: dict[str, Any], lr: float, freeze: bool) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    prototype_group["frozen"] = freeze


def _start_momentum(optimizer: LARC) -> None:
    """Momentum exists before the first step, as zeros: there is always something to checkpoint."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            optimizer.state[tensor].setdefault("momentum_buffer", torch.zeros_like(tensor))


def _mapping(parameter: nn.Parameter) -> Any:
    """DeepSpeed's record of which part of a parameter this rank's master holds, or None: none."""
    return parameter._hp_mapping  # type: ignore[attr-defined]


def _whole_fragments(module: nn.Module, optimizer: LARC) -> list[Fragment]:
    return [
        Fragment(
            name=name,
            shape=tuple(parameter.shape),
            start=0,
            weight=parameter.detach().view(-1),
            momentum=optimizer.state[parameter]["momentum_buffer"].view(-1),
        )
        for name, parameter in module.named_parameters()
    ]


def _partition_fragments(module: nn.Module, zero: Any) -> Iterator[Fragment]:
    for name, parameter in module.named_parameters():
        mapping = _mapping(parameter)
        if mapping is None:
            continue
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        momentum = zero.optimizer.state[flat]["momentum_buffer"]
        place = mapping.hp_fragment_address
        yield Fragment(
            name=name,
            shape=tuple(parameter.shape),
            start=mapping.lp_fragment_address.start,
            weight=flat.detach().narrow(0, place.start, place.numel),
            momentum=momentum.narrow(0, place.start, place.numel),
        )


def _segment_tables(zero: Any) -> dict[int, SegmentTable]:
    """For each flat tensor the optimiser was given, by id: which parameters lie where in it."""
    tables = {}
    for index, flat in enumerate(zero.single_partition_of_fp32_groups):
        parameters = zero.bit16_groups[index]
        places = [
            Segment(number, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)
            for number, parameter in enumerate(parameters)
            if (mapping := _mapping(parameter)) is not None
        ]
        tables[id(flat)] = SegmentTable(len(parameters), places, zero.real_dp_process_group[index])
    return tables


def _initialize(module: nn.Module, optimizer: LARC, config: EngineConfig) -> Any:
    import deepspeed

    # Shared-memory collectives for CPUs would be compiled now, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with _quiet(deepspeed.utils.logger):
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=_deepspeed_config(config)
        )
    return engine


def _deepspeed_config(config: EngineConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage, "round_robin_gradients": False}
    if config.zero_stage:
        # The norm is for clipping and for logs; it costs a wait for the device every step.
        zero["compute_grad_norm"] = False
    return {
        "train_micro_batch_size_per_gpu": 1,  # only its own samples/s would use it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # 1.0 unless set
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "timers": {"throughput": {"enabled": False}},
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            # Modules whose gradients would be summed over the ranks in bfloat16: none.
            "lower_precision_safe_modules": [],
        },
    }


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """DeepSpeed's warnings go to stderr; what it says about itself while it starts goes nowhere."""
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated")
    logger.setLevel(logging.ERROR)  # that our optimiser is "untested", on every start
    try:
        yield
    finally:
        logger.setLevel(logging.WARNING)
