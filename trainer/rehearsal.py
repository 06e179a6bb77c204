"""A step without memory: what it would hold beside the weights, and how much it would compute.

It runs on fake tensors (torch's FakeTensorMode: shapes and types, no memory), forward and backward,
with the model's own code. So what autocast casts, what autograd keeps, what activation
checkpointing computes again and what lives for a moment between two operators is counted by what
happens and not by a formula: every storage is followed from the operator that made it to its end.

Not seen: workspaces of cuDNN, fragments of the CUDA allocator, the buffers of collectives. The fake
tensors pose as a CPU's, whose operators keep the same activations as a GPU's.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainer.engine import PRECISIONS
from trainer.loss import swav_loss
from trainer.models import meta_model
from trainer.sinkhorn import sinkhorn

if TYPE_CHECKING:  # config.py imports the loop, and that the engine
    from trainer.config import Config

_UNIT_BYTES = 512  # the CUDA allocator hands out multiples


@dataclass(frozen=True)
class Rehearsal:
    """What one rank's step took; sizes in bytes, of what the step made: no weights, no crops.

    after_forward: held when the backward pass begins.
    casts: of that, weights in half precision: they are cast at each use.
    peak: the most at any moment, if gradients leave as soon as they are complete.
    peak_keeping: the most if they stay, themselves included.
    recomputed_flops: operations of the forward pass that the backward pass did once more.
    """

    after_forward: int
    casts: int
    peak: int
    peak_keeping: int
    recomputed_flops: int


def rehearse(config: "Config", *, batch_size: int, num_scored: int) -> Rehearsal:
    """Rehearse a step on `batch_size` images that go through the model at once.

    num_scored: rows for which this rank computes codes: those of its whole batch and of its part of
    the queue.

    A parameter's gradient is complete when that of the last resolution has been added; until then
    those of the first wait, whole and in float32, under every ZeRO stage, and are counted.
    """
    module = meta_model(config.model)
    with FakeTensorMode():
        _pretend(module)
        images = [
            torch.empty(each.count * batch_size, 3, each.size_px, each.size_px)
            for each in config.crops.groups
        ]
        with Ledger(module) as ledger:
            with _autocast(PRECISIONS[config.engine.precision]):
                _, scores_NK = module(images)
            after_forward, casts = ledger.live, ledger.casts
            forward_flops = ledger.convolution_flops
            loss = _loss(config, scores_NK, batch_size, num_scored)
            del scores_NK
            loss.backward()  # type: ignore[no-untyped-call]
    return Rehearsal(
        after_forward=after_forward,
        casts=casts,
        peak=ledger.peak,
        peak_keeping=ledger.peak_keeping,
        recomputed_flops=ledger.convolution_flops - forward_flops,
    )


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, follows what operators allocate and compute; what there was before does not count.

    Gradients of `module` are dropped once they are complete. Attributes: `live` bytes are held now,
    without complete gradients, `casts` of them weights in half precision; `convolution_flops` are
    those of forward passes, also of a segment that is computed again; the others are as in
    `Rehearsal`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.casts = self.peak = self.peak_keeping = self.convolution_flops = 0
        self._complete = 0
        self._module = module
        self._weights = {_address(each) for each in module.parameters()}
        self._known = self._weights | {_address(each) for each in module.buffers()}

    def __enter__(self) -> Self:
        self._hooks = [
            each.register_post_accumulate_grad_hook(self._drop_gradient)  # type: ignore[no-untyped-call]
            for each in self._module.parameters()
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = operator(*args, **(kwargs or {}))
        is_cast = operator is torch.ops.aten._to_copy.default and _address(args[0]) in self._weights
        if operator is torch.ops.aten.convolution.default:  # forward; backward is another
            count = flop_registry[operator.overloadpacket]
            self.convolution_flops += count(*args, **(kwargs or {}), out_val=results)
        for each in tree_leaves(results):
            if isinstance(each, Tensor):
                self._enter(each, is_cast)
        return results

    def _enter(self, tensor: Tensor, is_cast: bool) -> None:
        storage, address = tensor.untyped_storage(), _address(tensor)
        if address in self._known:  # a view, or written in place
            return
        size = math.ceil(storage.nbytes() / _UNIT_BYTES) * _UNIT_BYTES
        self._known.add(address)
        finalize(storage, self._leave, address, size, is_cast)
        self.live += size
        self.casts += size * is_cast
        self.peak = max(self.peak, self.live)
        self.peak_keeping = max(self.peak_keeping, self.live + self._complete)

    def _leave(self, address: int, size: int, is_cast: bool) -> None:
        self._known.discard(address)
        self.live -= size
        self.casts -= size * is_cast

    def _drop_gradient(self, parameter: Tensor) -> None:
        self._complete += parameter.nbytes
        parameter.grad = None


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _pretend(module: nn.Module) -> None:
    """Replace the weights and buffers by fake ones."""
    for layer in module.modules():
        for name, weight in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype)))
        for name, buffer in list(layer.named_buffers(recurse=False)):
            setattr(layer, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _autocast(precision: torch.dtype) -> AbstractContextManager[object]:
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast("cpu", precision, cache_enabled=False)  # as trainer.engine does


def _loss(config: "Config", scores_NK: Tensor, batch_size: int, num_scored: int) -> Tensor:
    """Codes of the whole batch, the queue's scores among them, and the loss of the part at hand."""
    crops, sharpness = config.loss.crops_for_assign, config.sinkhorn
    scored_AMK = torch.empty(len(crops), num_scored, config.model.num_prototypes)
    codes = [
        sinkhorn(scores_MK, epsilon=sharpness.epsilon, num_iterations=sharpness.num_iterations)[
            -batch_size:
        ]
        for scores_MK in scored_AMK
    ]
    return swav_loss(
        scores_NK,
        torch.stack(codes),
        num_crops=config.crops.num_crops,
        crops_for_assign=crops,
        temperature=config.loss.temperature,
    )
