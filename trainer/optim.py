"""LARC: SGD with momentum and a learning rate for every tensor, exact under ZeRO's flat partitions.

You, Gitman, Ginsburg 2017 (LARS), in the form SwAV trains with: NVIDIA apex's LARC around torch's
SGD. For every parameter w with gradient g, over the whole parameter,

    trust_ratio = trust_coefficient · ‖w‖ / (‖g‖ + weight_decay · ‖w‖ + eps)
    update      = trust_ratio · (g + weight_decay · w)
    buffer      = momentum · buffer + update
    w           = w - lr · buffer

When ‖w‖ or ‖g‖ is zero, update = g, without decay. With `clip` the ratio is
min(trust_ratio / lr, 1): the plain learning rate is then an upper bound.

ZeRO gives an optimizer one flat tensor per parameter group, holding this rank's share of parameters
that are cut anywhere. Norms taken of that tensor are silently wrong. `bind` therefore tells which
piece of a flat tensor belongs to which parameter: norms are summed piece by piece and over ranks,
with one all_reduce a group.

With a `loss_scale` (float16) gradients are divided by it; if a norm is not finite the group and
those after it stay as they are. The sums over ranks make all of them agree on that, for nothing.

Differences from apex: gradients are left as they are, unless there is a loss scale; the squared
norms of pieces are summed in float64; the host never waits for a norm.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, overload

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Section `optim`: LARC. The learning rate is section `schedule`."""

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    weight_decay: Annotated[float, Ge(0)] = 1e-6
    trust_coefficient: Annotated[float, Gt(0)] = 0.001
    eps: Annotated[float, Ge(0)] = 1e-8
    clip: bool = False
    exclude_bias_and_norm: bool = False  # they get plain SGD without decay; SwAV adapts them too


class Segment(NamedTuple):
    """One piece of a parameter inside a flat tensor; positions and lengths in elements."""

    param_index: int  # within the parameter group
    offset: int  # where the piece begins in the flat tensor
    length: int


@dataclass(frozen=True)
class SegmentTable:
    """What one flat tensor holds. Elements outside every segment are padding and stay untouched.

    `num_params` counts the parameters of the whole group, also those this rank holds nothing of;
    the ranks of `process_group` together hold every parameter once (None: this rank alone does).
    `device` is the one the group's collectives work on, if that is not the flat tensor's own.
    """

    num_params: int
    segments: Sequence[Segment]
    process_group: dist.ProcessGroup | None = None
    device: torch.device | None = None

    def __post_init__(self) -> None:
        segments = [Segment(*segment) for segment in self.segments]
        if any(not 0 <= segment.param_index < self.num_params for segment in segments):
            raise ValueError(f"a segment names a parameter outside 0 … {self.num_params - 1}")
        object.__setattr__(self, "segments", tuple(s for s in segments if s.length))


@dataclass
class _Pieces:
    """One parameter group, cut into tensors that each belong to one parameter.

    `slots` says to which, numbered through the group; there may be slots without a piece on this
    rank, and several pieces of one slot.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    num_slots: int = 0
    process_group: dist.ProcessGroup | None = None
    reduce_device: torch.device | None = None

    def add_whole(self, param: Tensor, grad: Tensor, buffer: Tensor) -> None:
        self._add(self.num_slots, param, grad, buffer)
        self.num_slots += 1

    def add_segments(
        self, param: Tensor, grad: Tensor, buffer: Tensor, table: SegmentTable
    ) -> None:
        flats = param.view(-1), grad.view(-1), buffer.view(-1)
        for segment in table.segments:
            cut = (flat.narrow(0, segment.offset, segment.length) for flat in flats)
            self._add(self.num_slots + segment.param_index, *cut)
        self.num_slots += table.num_params
        self.process_group = table.process_group
        self.reduce_device = table.device

    def _add(self, slot: int, param: Tensor, grad: Tensor, buffer: Tensor) -> None:
        self.slots.append(slot)
        self.params.append(param)
        self.grads.append(grad)
        self.buffers.append(buffer)


class LARC(Optimizer):
    """LARC over SGD with momentum. See the module's docstring for the rule.

    A parameter group with `frozen=True` is left out wholly: no decay, no momentum, no state. So is
    a parameter without a gradient. Norms are per parameter; biases and BatchNorm are no exception,
    as in SwAV, unless their group has `adapt=False`: that is plain SGD, without trust ratios.

    State per tensor: `momentum_buffer`, made at its first step.

    Attributes:
        loss_scale: what the loss was multiplied with, a scalar on the device; None: with nothing.
        overflow: whether a norm was not finite since `begin`, a scalar on the device; only with a
            loss scale.
    """

    loss_scale: Tensor | None = None
    overflow: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        clip: bool = False,
    ) -> None:
        if min(lr, momentum, weight_decay, eps) < 0 or trust_coefficient <= 0:
            raise ValueError("LARC takes no negative settings and a positive trust_coefficient")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "clip": clip,
            "frozen": False,
            "adapt": True,
        }
        super().__init__(params, defaults)
        self._shown: list[tuple[Tensor, Tensor]] = []  # gradient norms and trust ratios
        self._tables: dict[int, SegmentTable] = {}
        self._slot_indices: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def bind(self, segments: Mapping[int, SegmentTable]) -> None:
        """Say what the flat tensors in the parameter groups hold, by `id(tensor)`.

        Replaces what was bound before. Tensors that are not named are whole parameters, complete on
        this rank. Raises ValueError when a group mixes both, or process groups.
        """
        for group in self.param_groups:
            tables = [segments.get(id(tensor)) for tensor in group["params"]]
            if len({table and id(table.process_group) for table in tables}) > 1:
                raise ValueError(
                    "a parameter group is bound wholly or not at all, and to one process group"
                )
        self._tables = dict(segments)

    def begin(self) -> None:
        """A new step begins: forget what the last one showed. ZeRO steps group by group."""
        self._shown = []
        self.overflow = None

    def ranges(self) -> dict[str, Tensor]:
        """The smallest and largest gradient norm and trust ratio of the last step's parameters.

        Scalars on the device, float64; nothing before the first step, and of frozen groups.
        """
        names = ("grad_norm", "trust_ratio")
        columns = [torch.cat(values) for values in zip(*self._shown, strict=True)]
        return {
            f"{name}_{end}": getattr(column, end)()
            for name, column in zip(names, columns, strict=False)
            for end in ("min", "max")
        }

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every group that is not frozen."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["frozen"] and any(p.grad is not None for p in group["params"]):
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        pieces = self._cut(group["params"])
        weight_norms, grad_norms = self._norms(pieces, group["params"][0].device)
        if self.loss_scale is not None:
            grad_norms = grad_norms / self.loss_scale.to(grad_norms)
        trust_ratios, decays = _trust_ratios(weight_norms, grad_norms, group)
        self._shown.append((grad_norms, trust_ratios))
        momentum, lr = group["momentum"], group["lr"]
        if self.loss_scale is not None:
            trust_ratios, decays, momentum, lr = self._guarded(
                pieces, grad_norms, trust_ratios, decays, momentum, lr
            )
        if pieces.params:  # else this rank's partition is all padding; it only helped to sum
            self._update(pieces, trust_ratios, decays, momentum, lr)

    def _update(
        self,
        pieces: _Pieces,
        trust_ratios: Tensor,
        decays: Tensor,
        momentum: float | Tensor,
        lr: float | Tensor,
    ) -> None:
        slots = self._slot_index(pieces)
        dtype = pieces.params[0].dtype
        torch._foreach_mul_(pieces.buffers, momentum)
        grad_scales = trust_ratios[slots].to(dtype).unbind()
        torch._foreach_addcmul_(pieces.buffers, pieces.grads, grad_scales)
        decay_scales = decays[slots].to(dtype).unbind()
        torch._foreach_addcmul_(pieces.buffers, pieces.params, decay_scales)
        if isinstance(lr, Tensor):
            torch._foreach_addcmul_(pieces.params, pieces.buffers, [-lr] * len(pieces.params))
        else:
            torch._foreach_add_(pieces.params, pieces.buffers, alpha=-lr)

    def _guarded(
        self,
        pieces: _Pieces,
        grad_norms: Tensor,
        trust_ratios: Tensor,
        decays: Tensor,
        momentum: float,
        lr: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The factors of a step that unscales gradients, and does nothing after an overflow."""
        assert self.loss_scale is not None
        overflow = ~grad_norms.isfinite().all()
        self.overflow = overflow if self.overflow is None else self.overflow | overflow
        overflow = self.overflow
        for grad in pieces.grads:  # nothing times infinity is not nothing
            grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        nothing = torch.zeros_like(overflow, dtype=torch.float32)
        return (
            torch.where(overflow, 0.0, trust_ratios / self.loss_scale.to(trust_ratios)),
            torch.where(overflow, 0.0, decays),
            torch.where(overflow, 1.0, nothing + momentum),
            torch.where(overflow, 0.0, nothing + lr),
        )

    def _cut(self, tensors: list[Tensor]) -> _Pieces:
        pieces = _Pieces()
        for tensor in tensors:
            if tensor.grad is None:
                continue
            buffer = self._momentum_buffer(tensor)
            if (table := self._tables.get(id(tensor))) is None:
                pieces.add_whole(tensor, tensor.grad, buffer)
            else:
                pieces.add_segments(tensor, tensor.grad, buffer, table)
        return pieces

    def _momentum_buffer(self, tensor: Tensor) -> Tensor:
        state = self.state[tensor]
        if "momentum_buffer" not in state:
            # Zeros, as after steps without gradient: the first update becomes the buffer.
            state["momentum_buffer"] = torch.zeros_like(tensor)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _norms(self, pieces: _Pieces, device: torch.device) -> Tensor:
        """‖w‖ and ‖g‖ of every parameter over all ranks: float64 [2, num_slots]."""
        squares = torch.zeros(2, pieces.num_slots, dtype=torch.float64, device=device)
        if pieces.params:
            slots = self._slot_index(pieces)
            squares[0].index_add_(0, slots, _squared_norms(pieces.params))
            squares[1].index_add_(0, slots, _squared_norms(pieces.grads))
        if pieces.process_group is not None:
            reduced = squares.to(pieces.reduce_device or device)  # offloaded masters are elsewhere
            dist.all_reduce(reduced, group=pieces.process_group)
            squares = reduced.to(device)
        return squares.sqrt_()

    def _slot_index(self, pieces: _Pieces) -> Tensor:
        """`slots` on the device; kept, because copying them there waits for the device."""
        key = pieces.params[0].device, tuple(pieces.slots)
        if key not in self._slot_indices:
            self._slot_indices[key] = torch.tensor(pieces.slots, device=key[0])
        return self._slot_indices[key]


def _squared_norms(tensors: list[Tensor]) -> Tensor:
    # Norms in the tensors' own precision, as apex takes them: in float64 they cost five times more.
    return torch.stack(torch._foreach_norm(tensors)).double().square_()


def _trust_ratios(
    weight_norm: Tensor, grad_norm: Tensor, group: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What to multiply the gradient and the parameter with: two float64 [num_params]."""
    decay = group["weight_decay"]
    if not group["adapt"]:
        return torch.ones_like(grad_norm), torch.full_like(grad_norm, decay)
    denominator = grad_norm + weight_norm * decay + group["eps"]
    trust_ratio = group["trust_coefficient"] * weight_norm / denominator
    if group["clip"]:
        trust_ratio = (trust_ratio / group["lr"]).clamp_(max=1)
    adapts = (weight_norm > 0) & (grad_norm > 0)
    return torch.where(adapts, trust_ratio, 1.0), torch.where(adapts, trust_ratio * decay, 0.0)


def parameter_groups(
    model: nn.Module, *, exclude_bias_and_norm: bool = False
) -> list[dict[str, Any]]:
    """Groups for LARC; the last one is the prototypes, which are frozen and normalised alone.

    `model` has its prototypes in the attribute `prototypes`. Order within a group is the model's.
    The reference adapts every parameter; with `exclude_bias_and_norm` those of one dimension,
    biases and normalisations, are a group of plain SGD without decay, as most later work has it.
    """
    prototypes = list(model.get_submodule("prototypes").parameters())
    taken = {id(parameter) for parameter in prototypes}
    others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    excluded = [p for p in others if exclude_bias_and_norm and _num_dims(p) <= 1]
    held_back = {id(parameter) for parameter in excluded}
    adapted = [parameter for parameter in others if id(parameter) not in held_back]
    groups: list[dict[str, Any]] = [{"params": adapted, "frozen": False}]
    if excluded:
        groups.append({"params": excluded, "frozen": False, "adapt": False, "weight_decay": 0.0})
    return [*groups, {"params": prototypes, "frozen": False}]


def _num_dims(parameter: nn.Parameter) -> int:
    """Of the whole parameter: ZeRO-3 leaves an empty tensor in the module and notes the shape."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def normalize_rows(weight_KD: Tensor) -> None:
    """Divide every row by max(its L2 norm, 1e-12), in place, as F.normalize does."""
    weight_KD.copy_(nn.functional.normalize(weight_KD, dim=1))
