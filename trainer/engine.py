"""Turns a loss into a step of the optimiser on every rank. The only file that knows DeepSpeed.

`trainer.step` drives an `Engine`; `trainer.checkpoint` reads and writes the training state through
its fragments. Two engines keep the same promises:

    PlainEngine      a module and a LARC optimiser, any dtype; averages gradients itself. The
                     golden float64 runs go through it.
    DeepSpeedEngine  the same under DeepSpeed over float32 parameters: ZeRO stage 0 (everything on
                     every rank), 1 (masters and momentum divided over the ranks), 2 (gradients
                     too) or 3 (weights too). What a rank then holds is trainer.partitions.

What a caller would trip over in DeepSpeed, settled here once: its optimiser sees flat partitions,
so LARC is bound to the parameters in them; gradient clipping is on by default; `bf16.enabled`
rounds the parameters themselves and its `torch_autocast` in float16 scales the loss rank by rank,
so autocast and the loss scale are ours; its logger writes to stdout; its buckets take 2 GB.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from trainer.loss_scale import LossScale
from trainer.optim import LARC
from trainer.partitions import (
    PROTOTYPES,
    FlatParts,
    Fragment,
    Partitions,
    Shards,
    Whole,
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

BUCKET_ELEMENTS = 50_000_000  # of gradients that are summed at once: 200 MB
_ONE_SUBGROUP = 10**12  # elements: stage 3 then steps a parameter group as a whole


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
    round_robin_gradients: bool = False  # DeepSpeed's option: refused, see below

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.offload not in ("none", "cpu"):
            raise ValueError(f"offload is none or cpu, got {self.offload!r}")
        for wrong, why in self._contradictions():
            if wrong:
                raise ValueError(why)

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        yield (
            self.round_robin_gradients,
            "round_robin_gradients=true is refused: DeepSpeed then reorders the flat gradients "
            "under the optimiser, and LARC would scale parameters by each other's norms",
        )
        yield (
            self.offload == "cpu" and not self.zero_stage,
            "offload=cpu needs zero_stage 1, 2 or 3: stage 0 has no masters to offload",
        )
        yield (
            self.precision == "fp16" and self.gradient_clipping > 0,
            "gradient_clipping is not supported with precision=fp16, whose gradients are scaled: "
            "use bf16, or optim.clip, which bounds every parameter's step",
        )
        yield (
            self.compile and self.zero_stage == 3,
            "compile=true is not supported with zero_stage=3, which fetches weights in hooks "
            "between the modules: use stage 2, or compile=false",
        )


class Engine(Protocol):
    """What the step and the checkpoint need of a way to train."""

    module: nn.Module
    optimizer: LARC
    replicated: bool  # whether every rank holds every fragment whole
    accumulation_steps: int  # calls of forward and backward that make one step
    loss_scale: LossScale | None  # in float16

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Features [V*B, D] and scores [V*B, K] of a list of crops [V_g*B, 3, s, s], crop-major."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean over all ranks and over the parts of a batch."""

    def step(self, *, lr: float, freeze_prototypes: bool) -> None:
        """One step of the optimiser; frozen prototypes keep weight and momentum."""

    def normalize_prototypes(self) -> None:
        """Scale every prototype to length 1, in the optimiser's weights as in the module's."""

    def prototypes(self) -> Tensor:
        """All prototypes [K, D], without gradient."""

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
    loss_scale = None

    def __init__(
        self,
        module: nn.Module,
        optimizer: LARC,
        group: dist.ProcessGroup | None = None,
        *,
        accumulation_steps: int = 1,
        gradient_clipping: float = 0.0,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.accumulation_steps = accumulation_steps
        self._gradient_clipping = gradient_clipping
        self._group = group
        self._prototype_group = _prototype_group(module, optimizer)
        self._partitions = Whole(module, optimizer)

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See Engine."""
        features, scores = self.module(crops)
        return features, scores

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        (loss / self.accumulation_steps).backward()  # type: ignore[no-untyped-call]

    def step(self, *, lr: float, freeze_prototypes: bool) -> None:
        """See Engine."""
        self._average_gradients()
        if self._gradient_clipping:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._gradient_clipping)
        _begin_step(self.optimizer, self._prototype_group, lr, freeze_prototypes)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def normalize_prototypes(self) -> None:
        """See Engine."""
        self._partitions.normalize_prototypes()

    def prototypes(self) -> Tensor:
        """See Engine."""
        return self._partitions.prototypes()

    def fragments(self) -> list[Fragment]:
        """See Engine."""
        return list(self._partitions.fragments())

    def publish(self) -> None:
        """See Engine."""

    def _average_gradients(self) -> None:
        if self._group is None:
            return
        world_size = dist.get_world_size(self._group)
        for parameter in self.module.parameters():
            assert parameter.grad is not None, "every parameter takes part in the loss"
            dist.all_reduce(parameter.grad, group=self._group)
            parameter.grad /= world_size


class DeepSpeedEngine:
    """The step under DeepSpeed, over float32 parameters.

    `module` lies on this rank's device with contiguous float32 parameters, all in `optimizer`,
    which is built from `trainer.optim.parameter_groups(module)`; for stage 3 they may have been
    divided already (`divide`). The world must have been started (trainer.distributed).
    """

    def __init__(self, module: nn.Module, optimizer: LARC, config: EngineConfig) -> None:
        self._prototype_group = _prototype_group(module, optimizer)
        device = next(module.buffers(), next(module.parameters())).device
        _compute_in(module, config, device)
        self._deepspeed = _initialize(module, optimizer, config)
        self.module = module
        self.optimizer = optimizer
        self.accumulation_steps = config.accumulation_steps
        self._partitions = self._divided(config.zero_stage, device)
        self.replicated = self._partitions.replicated
        optimizer.bind(self._partitions.tables())
        self.loss_scale = LossScale(device) if config.precision == "fp16" else None
        optimizer.loss_scale = self.loss_scale.value if self.loss_scale else None
        self._num_backwards = 0

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See Engine. In half precision under autocast, except where the model turns that off."""
        features, scores = self._deepspeed(crops)
        return features, scores

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        self._deepspeed.backward(loss if self.loss_scale is None else loss * self.loss_scale.value)
        self._num_backwards += 1
        if self._num_backwards % self.accumulation_steps:
            self._deepspeed.step()  # only counts

    def step(self, *, lr: float, freeze_prototypes: bool) -> None:
        """See Engine."""
        assert self._num_backwards % self.accumulation_steps == 0, "a part of the batch is missing"
        _begin_step(self.optimizer, self._prototype_group, lr, freeze_prototypes)
        self._deepspeed.step()
        if self.loss_scale is not None:
            self.loss_scale.update(self._overflow())

    def normalize_prototypes(self) -> None:
        """See Engine."""
        self._partitions.normalize_prototypes()

    def prototypes(self) -> Tensor:
        """See Engine."""
        return self._partitions.prototypes()

    def fragments(self) -> list[Fragment]:
        """See Engine."""
        return list(self._partitions.fragments())

    def publish(self) -> None:
        """See Engine."""
        self._partitions.publish()

    def _divided(self, stage: int, device: torch.device) -> Partitions:
        if stage == 0:
            return Whole(self.module, self.optimizer)
        parts = Shards if stage == 3 else FlatParts
        return parts(self.module, self._deepspeed.optimizer, device)

    def _overflow(self) -> Tensor:
        """Whether the step was left out: by the optimiser, or by DeepSpeed before it was asked."""
        assert self.loss_scale is not None
        if self.optimizer.overflow is None:  # no group was stepped
            return torch.ones_like(self.loss_scale.value, dtype=torch.bool)
        return self.optimizer.overflow.to(self.loss_scale.value.device)


def divide(module: nn.Module) -> None:
    """Leave every rank its share of the parameters of `module`, as ZeRO stage 3 does.

    Called with one small module after the other while a model is built, it keeps any rank from ever
    holding the model whole. Rank 0's values count.
    """
    deepspeed = _deepspeed()
    with _quiet(deepspeed.utils.logger):
        deepspeed.zero.Init(module=module, mem_efficient_linear=False, dtype=torch.float32)


def _prototype_group(module: nn.Module, optimizer: LARC) -> dict[str, Any]:
    """The group that can be frozen: the dict stays when DeepSpeed replaces the tensors in it."""
    group = optimizer.param_groups[-1]
    prototypes = module.get_parameter(PROTOTYPES)
    held = [id(parameter) for each in optimizer.param_groups for parameter in each["params"]]
    assert [id(p) for p in group["params"]] == [id(prototypes)], "a group of their own"
    assert sorted(held) == sorted(id(p) for p in module.parameters()), "all, and no others"
    assert all(p.is_contiguous() for p in module.parameters()), "fragments are flat views"
    return group


def _begin_step(optimizer: LARC, prototype_group: dict[str, Any], lr: float, freeze: bool) -> None:
    optimizer.begin()
    for group in optimizer.param_groups:
        group["lr"] = lr
    prototype_group["frozen"] = freeze


def _compute_in(module: nn.Module, config: EngineConfig, device: torch.device) -> None:
    """Let the forward pass of `module` work in the configured precision, compiled or not."""
    if config.compile:
        trunk = module.get_submodule("backbone")
        trunk.compile(dynamic=False)  # one kernel a resolution
    if config.precision != "fp32":
        # Casts are not kept for the next resolution: its gradients would be added to the others' in
        # half precision, and under stage 3 they would be a whole model on every rank.
        half = torch.autocast(device.type, PRECISIONS[config.precision], cache_enabled=False)
        module.forward = half(module.forward)


def _initialize(module: nn.Module, optimizer: LARC, config: EngineConfig) -> Any:
    deepspeed = _deepspeed()
    with _quiet(deepspeed.utils.logger):
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=_deepspeed_config(config)
        )
    return engine


def _deepspeed() -> Any:
    import deepspeed

    # Shared-memory collectives for CPUs would be compiled at first use, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _deepspeed_config(config: EngineConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # only its own samples/s would use it
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": config.gradient_clipping,  # 1.0 unless set
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_config(config),
        "timers": {"throughput": {"enabled": False}},
    }


def _zero_config(config: EngineConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "round_robin_gradients": False,
        "overlap_comm": config.overlap_communication,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "sub_group_size": _ONE_SUBGROUP,
        "memory_efficient_linear": False,  # it replaces torch's function for the whole process
    }
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    elif config.zero_stage in (1, 2) and not config.gradient_clipping:
        # The norm is for clipping and for logs; it costs a wait for the device every step.
        zero["compute_grad_norm"] = False
    return zero


def _quiet(logger: logging.Logger) -> AbstractContextManager[None]:
    """DeepSpeed's warnings go to stderr; what it says about itself while it starts goes nowhere."""
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated")
    return _at_level(logger, logging.ERROR)  # else that our optimiser is "untested", on every start


@contextlib.contextmanager
def _at_level(logger: logging.Logger, level: int) -> Iterator[None]:
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(logging.WARNING)
