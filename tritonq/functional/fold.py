"""Folding BatchNorm into a convolution, as a differentiable function and on modules."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tritonq.functional.validate import check_float_tensor
from tritonq.qparams import is_readable
from tritonq.reference.fold import fold_bias, fold_scale, scale_out_channels


class FoldedConv(NamedTuple):
    """Parameters of a convolution into which the BatchNorm behind it was folded.

    Attributes:
        weight: shaped as the convolution's.
        bias: (out_channels,).
    """

    weight: Tensor
    bias: Tensor


def fold_conv_bn(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    transposed: bool = False,
    groups: int = 1,
) -> FoldedConv:
    """Fold a BatchNorm's running statistics and affine into the convolution before it.

    ``W' = W t``, ``b' = β + (b - running_mean) t`` with ``t = γ / sqrt(running_var + eps)``; a missing mean, variance,
    γ, β or b counts as 0, 1, 1, 0 or 0. Differentiable in weight, bias, γ and β.

    Args:
        weight: (out, in/groups, ...), or (in, out/groups, ...) when ``transposed``.
        bias: (out,) or None.
        running_mean: (out,) or None.
        running_var: (out,), not negative, or None.
        gamma: (out,) or None.
        beta: (out,) or None.
        eps: added to the variance.
        transposed: whether the convolution is a transposed one.
        groups: number of groups of the convolution; read only when transposed.

    Returns:
        New tensors, in the dtypes that torch promotes the arguments to.

    Raises:
        TypeError: the weight is not a floating point tensor.
        ValueError: a vector has the wrong length, or the running variance is negative or not finite (checked on CPU
            tensors only).

    Source: MegEngine's fold_weight_bias, in which mean and variance may be None, too.

    Examples:
        >>> fold_conv_bn(torch.ones(1, 1, 1, 1), None, torch.ones(1), torch.full((1,), 3.0), None, None, 1.0)
        FoldedConv(weight=tensor([[[[0.5000]]]]), bias=tensor([-0.5000]))
    """
    check_float_tensor("weight", weight)
    out_channels = weight.shape[1] * groups if transposed else weight.shape[0]
    vectors = {"bias": bias, "running_mean": running_mean, "running_var": running_var, "gamma": gamma, "beta": beta}
    for name, vector in vectors.items():
        if vector is not None and tuple(vector.shape) != (out_channels,):
            raise ValueError(f"{name} must have shape ({out_channels},), got {tuple(vector.shape)}")
    running_mean = weight.new_zeros(out_channels) if running_mean is None else running_mean
    running_var = weight.new_ones(out_channels) if running_var is None else running_var
    if is_readable(running_var) and not bool((torch.isfinite(running_var) & (running_var >= 0)).all()):
        raise ValueError("running_var must be finite and not negative")
    scale = fold_scale(running_var, gamma, eps)
    return FoldedConv(scale_out_channels(weight, scale, transposed, groups), fold_bias(bias, running_mean, scale, beta))


def fuse_conv_bn(conv: nn.Module, bn: nn.Module) -> nn.Module:
    """Return a copy of ``conv`` that computes what ``bn(conv(x))`` gives while ``bn`` is in eval mode.

    Its weight and bias (even if ``conv`` has none) are new parameters; they require gradients if ``conv.weight`` does.
    ``conv`` and ``bn`` stay as they are; ``bn`` may be in either mode.

    Args:
        conv: ``nn.Conv1d`` to ``nn.Conv3d``, or a transposed one.
        bn: the BatchNorm after it, with running statistics.

    Raises:
        TypeError: not a convolution, or not a BatchNorm.
        ValueError: a BatchNorm without running statistics or of another number of channels, or with a running variance
            that is negative or not finite (checked on CPU tensors only).

    Source: docs/conv-bn.md, "Folding"; torch.nn.utils.fusion.

    Examples:
        >>> import torch
        >>> conv, bn = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4).eval()
        >>> x = torch.randn(2, 3, 5, 5)
        >>> torch.allclose(fuse_conv_bn(conv, bn)(x), bn(conv(x)), atol=1e-6)
        True
    """
    if not isinstance(conv, nn.modules.conv._ConvNd):
        raise TypeError(f"expected a convolution, got {type(conv).__name__}")
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"expected a BatchNorm, got {type(bn).__name__}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("this BatchNorm keeps no running statistics (track_running_stats=False): nothing to fold")
    fused = copy.deepcopy(conv)
    folded = fold_conv_bn(
        conv.weight,
        conv.bias,
        bn.running_mean,
        bn.running_var,
        bn.weight,
        bn.bias,
        bn.eps,
        conv.transposed,
        conv.groups,
    )
    fused.weight = nn.Parameter(folded.weight.detach(), conv.weight.requires_grad)
    fused.bias = nn.Parameter(folded.bias.detach(), conv.weight.requires_grad)
    return fused
