"""BatchNorm over the batches of several ranks, on any device.

torch.nn.SyncBatchNorm refuses CPU tensors, so a run on two CPU ranks could not be compared with
one. This one does the same with operations every device has, and keeps the parameter and buffer
names of BatchNorm:

    forward   per rank the mean and variance of each channel, one all_reduce of sums in float64
    backward  per rank the sums of dy and of dy · x̂, one all_reduce

Reductions and the forward pass are torch's own fused BatchNorm kernels, on the GPU too, and the
gradient of the input is two elementwise operations, so one implementation serves every device.
Statistics are at least float32 whatever autocast makes of the activations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """BatchNorm of [N, C, …] with the statistics of all ranks of `process_group`.

    In evaluation, and with a single rank, it is plain BatchNorm. Ranks may bring different batch
    sizes. Like every gradient before averaging, those of weight and bias are of this rank's rows
    alone.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        group = self.process_group
        uses_batch = self.training or not self.track_running_stats
        if not uses_batch or group is None or dist.get_world_size(group) == 1:
            return super().forward(input)
        count, mean, var = _global_statistics(input.detach(), group)
        if self.training and self.track_running_stats:
            self._track(count, mean, var)
        output: Tensor = _Normalize.apply(
            input, self.weight, self.bias, count, mean, var, self.eps, group
        )
        return output

    @torch.no_grad()
    def _track(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        unbiased = var * (count / (count - 1)).to(var.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        if self.num_batches_tracked is not None:  # it is paused otherwise
            self.num_batches_tracked.add_(1)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) · weight + bias; mean and var depend on the x of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        count: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, count, mean, var)
        ctx.eps, ctx.group = eps, group
        return nn.functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, count, mean, var = ctx.saved_tensors
        # The kernel is told that the statistics are constants: that gives Σ dy · x̂ and Σ dy.
        _, sum_grad_xhat, sum_grad = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack([sum_grad_xhat, sum_grad])
        dist.all_reduce(sums, group=ctx.group)
        grad_x = _input_gradient(grad, x, weight, mean, torch.rsqrt(var + ctx.eps), sums / count)
        if weight is None:
            return grad_x, None, None, None, None, None, None, None
        return grad_x, sum_grad_xhat, sum_grad, None, None, None, None, None


def _input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    averages: Tensor,
) -> Tensor:
    """scale · (dy - avg(dy) - x̂ · avg(dy · x̂)) with scale = weight · rstd, per channel affine in x.

    Per-channel values are float32, so half-precision activations are rounded once, at the end.
    """
    average_grad_xhat, average_grad = averages
    scale = rstd if weight is None else rstd * weight
    slope = -scale * rstd * average_grad_xhat
    offset = -scale * average_grad - slope * mean
    scale, slope, offset = (v.view(1, -1, *(1,) * (x.dim() - 2)) for v in (scale, slope, offset))
    return torch.addcmul(offset, x, slope).addcmul_(grad, scale).to(x.dtype)


def _global_statistics(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Count (rows · pixels, all ranks), mean and biased variance of every channel.

    The count is float64, the others at least float32. Each rank's mean and variance are taken by a
    stable kernel; only they are summed, in float64, where E[x²] - E[x]² costs nothing that float32
    could see.
    """
    mean, var = _local_statistics(x)
    wide_mean, wide_var = mean.double(), var.double()
    count = wide_mean.new_full((1,), x.numel() / x.shape[1])
    moments = torch.cat([count, wide_mean * count, (wide_var + wide_mean.square()) * count])
    dist.all_reduce(moments, group=group)
    count = moments[0]
    wide_mean, second = (moments[1:] / count).chunk(2)
    wide_var = (second - wide_mean.square()).clamp_(min=0)
    return count, wide_mean.to(mean.dtype), wide_var.to(mean.dtype)


def _local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype in (torch.float16, torch.bfloat16) and not x.is_cuda:
        x = x.float()  # the CPU's kernel would return half-precision statistics
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    return mean, var


@contextmanager
def paused_statistics(module: nn.Module) -> Iterator[None]:
    """Within, BatchNorm of `module` still normalises by its batch but keeps no account of it.

    For what looks at images a second time: else running statistics would be moved twice by them
    (pytorch issue 96136: activation checkpointing does so). They are moved by nothing rather than
    left out, since checkpointing compares what both passes keep for the backward pass.
    """
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


@torch.no_grad()
def average_statistics(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give all ranks the mean of their running statistics, in place. Collective.

    Ranks that normalise in groups of their own have different ones; training never reads them, but
    a checkpoint holds one set.
    """
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    buffers = [b for n in norms for b in (n.running_mean, n.running_var) if b is not None]
    if not buffers:
        return
    flat = torch.cat([buffer.double() for buffer in buffers])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    means = torch.split(flat, [len(buffer) for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean)


def convert_sync_batchnorm(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Replace every BatchNorm1d/2d/3d in `module` by a SyncBatchNorm over `group`.

    Parameters and buffers are taken over, not copied, and keep their names. Returns `module`, or
    its replacement when it is itself a BatchNorm. Raises ValueError for momentum=None (a cumulative
    average).
    """
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return _synchronized(module, group)
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, group))
    return module


def _synchronized(
    norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, group: dist.ProcessGroup
) -> SyncBatchNorm:
    if norm.momentum is None:
        raise ValueError("SyncBatchNorm has no cumulative average: give BatchNorm a momentum")
    synchronized = SyncBatchNorm(
        norm.num_features,
        norm.eps,
        norm.momentum,
        affine=False,
        track_running_stats=norm.track_running_stats,
        process_group=group,
    )
    synchronized.affine = norm.affine
    synchronized.weight, synchronized.bias = norm.weight, norm.bias
    synchronized.running_mean, synchronized.running_var = norm.running_mean, norm.running_var
    synchronized.num_batches_tracked = norm.num_batches_tracked
    return synchronized.train(norm.training)
