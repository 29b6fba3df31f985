"""BatchNorms that are part of a quantized layer: frozen ones, synchronized ones, and the state of one training step."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tritonq.arithmetic import as_dtype
from tritonq.functional.differentiable_once import differentiable_once
from tritonq.functional.recomputation import is_recomputing
from tritonq.nn.fusable import has_hooks
from tritonq.reference.conv_bn import BatchNormState


class FrozenBatchNorm(nn.modules.batchnorm._BatchNorm):
    """``weight · x + bias`` per channel with fixed numbers, which no training step changes. It is always in eval mode.

    Its running mean is 0, its running variance 1 and ``eps`` 0, so that folding it multiplies a convolution's weight by
    ``weight``. Weight and bias are buffers, copies of the arguments; there are no parameters.

    Args:
        weight: factors, (channels,).
        bias: summands, (channels,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(len(weight), eps=0.0, affine=False, device=weight.device, dtype=weight.dtype)
        for name, values in (("weight", weight), ("bias", bias)):
            self._parameters.pop(name)
            self.register_buffer(name, values.detach().clone())
        self.training = False

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stay in eval mode, whatever ``mode`` is, and return the module."""
        return super().train(False)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept an input of any number of dimensions."""


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm, which here also works on CPUs, over gloo.

    In training, mean and variance are those of all ranks' batches together, whose sizes may differ. The gradient of the
    input is that of one process that had all batches; those of weight and bias are sums over this rank's batch, which
    DistributedDataParallel averages. Source: torch.nn.SyncBatchNorm.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return ``γ (x - μ) / sqrt(var + eps) + β`` per channel (axis 1), in the shape and dtype of ``input``.

        In training μ and the biased variance are those of all ranks of the process group, or of this batch if
        ``torch.distributed`` is not initialized; the running statistics are updated by ``momentum`` (None: they are
        plain averages), with the unbiased variance. In eval mode μ and the variance are the running statistics; if none
        are kept, those of this batch.

        Raises:
            ValueError: ``input`` has fewer than 2 axes, or in training without other ranks one value per channel.
        """
        if input.device.type != "cpu":
            return super().forward(input)
        group = self._group() if self.training else None
        if group is None:  # torch's SyncBatchNorm refuses CPUs, even for one rank
            return nn.modules.batchnorm._BatchNorm.forward(self, input)
        self._check_input_dim(input)
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        running = (self.running_mean, self.running_var, float(momentum or 0.0))
        result = _Synchronized.apply(input, self.weight, self.bias, running, self.eps, group)  # type: ignore[no-untyped-call]
        return cast(Tensor, result)

    def _group(self) -> Any:
        """Return the process group to share statistics with, the module's or the default one.

        None if ``torch.distributed`` is not initialized, or if the group has one rank.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None


class _Synchronized(torch.autograd.Function):
    """``γ (x - μ) / sqrt(var + eps) + β`` with the mean μ and biased variance of all ranks.

    The forward updates the running statistics in place: ``r += momentum (v - r)``, where r is the running mean or
    variance and v is μ or the unbiased variance.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None, float],
        eps: float,
        group: Any,
    ) -> Tensor:
        """Return the normalised ``x``, in its shape and dtype, and update the running statistics.

        Args:
            ctx: of torch.autograd.
            x: the input, (batch, channels, ...).
            weight: γ; None: 1.
            bias: β; None: 0.
            running: running mean and running variance (both None: not kept), and momentum.
            eps: added to the variance.
            group: the process group whose ranks share statistics; all of them must make this call.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        count = wide.new_full((1,), x.numel() // x.shape[1])
        total = wide.sum(axes)
        mean = total / count.clamp(min=1)
        squares = (wide - mean.view(shape)).square().sum(axes)
        own = torch.cat([count, mean, squares])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        counts, means, deviations = torch.split(torch.stack(gathered), [1, len(mean), len(mean)], dim=1)
        number = counts.sum()
        mean = (counts * means).sum(0) / number
        var = (deviations + counts * (means - mean).square()).sum(0) / number
        running_mean, running_var, momentum = running
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * number / (number - 1).clamp(min=1)).to(running_var.dtype), momentum)
        inverse_std = torch.rsqrt(var + eps)
        scale = inverse_std if weight is None else inverse_std * weight
        y = (wide - mean.view(shape)) * scale.view(shape)
        ctx.group, ctx.number = group, number
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.bias_dtype = None if bias is None else bias.dtype
        shifted: Tensor = y if bias is None else y + bias.view(shape)
        return as_dtype(shifted, x.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x``, weight and bias (None if there is none), and None for the other arguments.

        Sums for the gradient of ``x`` are those of all ranks, by one collective. The gradients of weight and bias are
        this rank's: DistributedDataParallel averages them.
        """
        x, weight, mean, inverse_std = ctx.saved_tensors
        axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        g = dy.to(mean.dtype)
        normalised = (x.to(mean.dtype) - mean.view(shape)) * inverse_std.view(shape)
        sums = torch.stack([g.sum(axes), (g * normalised).sum(axes)])
        own = sums.clone()
        dist.all_reduce(sums, group=ctx.group)
        scale = inverse_std if weight is None else inverse_std * weight
        centred = g - (sums[0] / ctx.number).view(shape) - normalised * (sums[1] / ctx.number).view(shape)
        dx = (scale.view(shape) * centred).to(x.dtype)
        dweight = None if weight is None else own[1].to(weight.dtype)
        dbias = None if ctx.bias_dtype is None else own[0].to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None, None


def batch_norm_state(bn: nn.modules.batchnorm._BatchNorm) -> BatchNormState:
    """Return a `BatchNormState` of ``bn`` for one training step, and count the step.

    It has running mean, running variance, which ``bn`` must keep, momentum and eps.

    The running statistics are the module's own tensors, for the step to update. To count is to add 1 to
    ``num_batches_tracked``; a ``bn.momentum`` of None becomes 1 over that count, a 0-d float64 tensor. In a forward
    that activation checkpointing repeats nothing is counted, and the statistics are copies, with momentum 0.
    """
    running_mean, running_var = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
    if is_recomputing():
        return BatchNormState(running_mean.clone(), running_var.clone(), 0.0, bn.eps)
    momentum: float | Tensor | None = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    if momentum is None:
        momentum = cast(Tensor, bn.num_batches_tracked).double().reciprocal()
    return BatchNormState(running_mean, running_var, momentum, bn.eps)


def is_plain(bn: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether ``bn`` is exactly an ``nn.BatchNorm1d``, ``2d`` or ``3d`` without hooks.

    An ``nn.SyncBatchNorm``, or a subclass, without hooks counts too while ``torch.distributed`` is not initialized.
    """
    alone = isinstance(bn, nn.SyncBatchNorm) and not (dist.is_available() and dist.is_initialized())
    return (alone or type(bn) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and not has_hooks(bn)


def gamma_signs(bn: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """Return the sign of γ per channel, (channels,), in γ's dtype: -1 where γ < 0, else 1.

    Without γ all are 1, in the dtype of the running variance, which ``bn`` must then keep.
    """
    gamma = cast(Tensor, bn.running_var) if bn.weight is None else bn.weight.detach()
    return torch.where(gamma < 0, -1.0, 1.0).to(gamma.dtype)
