"""What this rank holds of every parameter, whichever ZeRO stage has divided them.

The engine (trainer.engine) builds one of these when DeepSpeed has divided a model; the optimiser is
bound through `tables`, checkpoints go through `fragments`. Everywhere masters are float32.

    Whole      stage 0, and without DeepSpeed: the module's own parameters are the masters
    FlatParts  stages 1 and 2: the module keeps whole weights; each rank's share of the masters is
               a flat tensor a parameter group, in which parameters are cut anywhere
    Shards     stage 3: the module keeps nothing between uses; every rank has an equal share of
               every parameter, and those of a group lie one behind the other in a flat tensor

Source of the internals: deepspeed 0.19, runtime/zero/stage_1_and_2.py and utils/tensor_fragment.py
(`_hp_mapping`: which slice of a parameter lies where in this rank's flat master), stage3.py
(`grad_position`, `fp32_partitioned_groups_flat`) and partition_parameters.py (`ds_shape`, …).

Shapes: K prototypes, D features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.optim import LARC, Segment, SegmentTable, normalize_rows

PROTOTYPES = "prototypes.weight"


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


class Partitions(Protocol):
    """A rank's share of a model in training."""

    replicated: bool  # whether every rank holds every fragment whole

    def tables(self) -> dict[int, SegmentTable]:
        """For each flat tensor the optimiser is given, by id: which parameters lie where in it."""

    def fragments(self) -> Iterator[Fragment]:
        """The weights and momenta this rank holds."""

    def normalize_prototypes(self) -> None:
        """Scale every prototype to length 1, in the masters as in the module. Collective."""

    def prototypes(self) -> Tensor:
        """All prototypes [K, D], without gradient; under stage 3 a copy, and collective."""

    def publish(self) -> None:
        """Make the module's weights those of the masters, after these were written. Collective."""


class Whole:
    """Every rank has everything."""

    replicated = True

    def __init__(self, module: nn.Module, optimizer: LARC) -> None:
        self._module = module
        self._optimizer = optimizer
        for parameter in module.parameters():
            _start_momentum(optimizer, parameter)

    def tables(self) -> dict[int, SegmentTable]:
        """See Partitions. The optimiser is given whole parameters."""
        return {}

    def fragments(self) -> Iterator[Fragment]:
        """See Partitions."""
        for name, parameter in self._module.named_parameters():
            momentum = self._optimizer.state[parameter]["momentum_buffer"].view(-1)
            yield Fragment(name, tuple(parameter.shape), 0, parameter.detach().view(-1), momentum)

    def normalize_prototypes(self) -> None:
        """See Partitions."""
        normalize_rows(self._module.get_parameter(PROTOTYPES))

    def prototypes(self) -> Tensor:
        """See Partitions."""
        return self._module.get_parameter(PROTOTYPES).detach()

    def publish(self) -> None:
        """See Partitions. The optimiser works on the module's own parameters."""


class FlatParts:
    """ZeRO stages 1 and 2. `zero` is DeepSpeed's optimiser, `device` where collectives work."""

    replicated = False

    def __init__(self, module: nn.Module, zero: Any, device: torch.device) -> None:
        self._module = module
        self._zero = zero
        self._device = device
        for flat in zero.single_partition_of_fp32_groups:
            _start_momentum(zero.optimizer, flat)

    def tables(self) -> dict[int, SegmentTable]:
        """See Partitions."""
        return {
            id(flat): SegmentTable(
                len(self._zero.bit16_groups[index]),
                list(self._segments(index)),
                self._zero.real_dp_process_group[index],
                self._device,
            )
            for index, flat in enumerate(self._zero.single_partition_of_fp32_groups)
        }

    def fragments(self) -> Iterator[Fragment]:
        """See Partitions."""
        for name, parameter in self._module.named_parameters():
            mapping = _mapping(parameter)
            if mapping is None:
                continue
            flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            momentum = self._zero.optimizer.state[flat]["momentum_buffer"]
            place = mapping.hp_fragment_address
            yield Fragment(
                name=name,
                shape=tuple(parameter.shape),
                start=mapping.lp_fragment_address.start,
                weight=flat.detach().narrow(0, place.start, place.numel),
                momentum=momentum.narrow(0, place.start, place.numel),
            )

    def normalize_prototypes(self) -> None:
        """See Partitions.

        The module's weight is, bit for bit, the masters of all ranks put together. So every rank
        normalises it whole and copies its own part back to its master: rows that straddle ranks
        need no sum. Without the copy the next step would undo the normalisation.
        """
        weight = self._module.get_parameter(PROTOTYPES)
        normalize_rows(weight)
        if (mapping := _mapping(weight)) is not None:
            mapping.update_hp()

    def prototypes(self) -> Tensor:
        """See Partitions."""
        return self._module.get_parameter(PROTOTYPES).detach()

    def publish(self) -> None:
        """See Partitions. Every rank's masters are gathered into the module."""
        self._zero.update_lp_params()

    def _segments(self, index: int) -> Iterator[Segment]:
        for number, parameter in enumerate(self._zero.bit16_groups[index]):
            if (mapping := _mapping(parameter)) is not None:
                place = mapping.hp_fragment_address
                yield Segment(number, place.start, place.numel)


class Shards:
    """ZeRO stage 3. `zero` is DeepSpeed's optimiser, `device` where collectives work."""

    replicated = False

    def __init__(self, module: nn.Module, zero: Any, device: torch.device) -> None:
        self._module = module
        self._zero = zero
        self._device = device
        self._rank = dist.get_rank(zero.dp_process_group)
        for flat in zero.fp32_partitioned_groups_flat:
            _start_momentum(zero.optimizer, flat)

    def tables(self) -> dict[int, SegmentTable]:
        """See Partitions."""
        return {
            id(flat): SegmentTable(
                len(parameters),
                [Segment(n, *self._place(p)[1:]) for n, p in enumerate(parameters)],
                self._zero.dp_process_group,
                self._device,
            )
            for flat, parameters in zip(
                self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True
            )
        }

    def fragments(self) -> Iterator[Fragment]:
        """See Partitions."""
        for name, parameter in self._module.named_parameters():
            group, offset, length = self._place(parameter)
            if length:
                flat = self._zero.fp32_partitioned_groups_flat[group]
                momentum = self._zero.optimizer.state[flat]["momentum_buffer"]
                yield Fragment(
                    name=name,
                    shape=parameter_shape(parameter),
                    start=self._start(parameter),
                    weight=flat.detach().narrow(0, offset, length),
                    momentum=momentum.narrow(0, offset, length),
                )

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """See Partitions. A row may lie on several ranks: its squares are summed over them."""
        parameter = self._module.get_parameter(PROTOTYPES)
        num_prototypes, feat_dim = parameter_shape(parameter)
        group, offset, length = self._place(parameter)
        start = self._start(parameter)
        mine = self._zero.fp32_partitioned_groups_flat[group].detach().narrow(0, offset, length)
        first, before = divmod(start, feat_dim) if length else (0, 0)
        after = -(before + length) % feat_dim
        rows_RD = nn.functional.pad(mine, (before, after)).view(-1, feat_dim)
        squares_K = torch.zeros(num_prototypes, dtype=torch.float64, device=self._device)
        squares_K[first : first + len(rows_RD)] = rows_RD.double().square().sum(1).to(self._device)
        dist.all_reduce(squares_K, group=self._zero.dp_process_group)
        norms_R = squares_K[first : first + len(rows_RD)].sqrt().clamp_(min=1e-12).to(mine)
        mine.copy_((rows_RD / norms_R[:, None]).view(-1)[before : before + length])
        self._republish([parameter])

    def prototypes(self) -> Tensor:
        """See Partitions."""
        parameter: Any = self._module.get_parameter(PROTOTYPES)
        if _is_gathered(parameter):
            return parameter.detach().clone()  # type: ignore[no-any-return]
        parameter.all_gather()
        whole: Tensor = parameter.detach().clone()
        parameter.partition()
        return whole

    def publish(self) -> None:
        """See Partitions."""
        self._republish(list(self._module.parameters()))

    def _republish(self, parameters: list[Any]) -> None:
        """Bring shards, and the whole copies kept of small parameters, to the masters' values."""
        for parameter in parameters:
            group, offset, length = self._place(parameter)
            master = self._zero.fp32_partitioned_groups_flat[group].detach()
            shard = parameter.ds_tensor.view(-1)[:length]
            if length and master[offset:].data_ptr() != shard.data_ptr():  # offloaded
                shard.copy_(master[offset : offset + length])
        kept = [parameter for parameter in parameters if _is_gathered(parameter)]
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def _place(self, parameter: Any) -> tuple[int, int, int]:
        """Which flat tensor holds this rank's share, from where on, and how much of it is real."""
        group, offset, share = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return group, offset, max(0, min(share, parameter.ds_numel - self._start(parameter)))

    def _start(self, parameter: Any) -> int:
        return self._rank * int(parameter.partition_numel())


def parameter_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter: stage 3 leaves an empty tensor in the module and notes the shape."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _is_gathered(parameter: Any) -> bool:
    return str(parameter.ds_status.name) == "AVAILABLE"


def _mapping(parameter: nn.Parameter) -> Any:
    """DeepSpeed's record of which part of a parameter this rank's master holds, or None: none."""
    return parameter._hp_mapping  # type: ignore[attr-defined]


def _start_momentum(optimizer: LARC, tensor: Tensor) -> None:
    """Momentum exists before the first step, as zeros: there is always something to checkpoint."""
    optimizer.state[tensor].setdefault("momentum_buffer", torch.zeros_like(tensor))
