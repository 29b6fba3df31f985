"""Folding BatchNorm into the convolution before it, in PyTorch.

The *fold* is γ/σ per out channel, with ``σ = sqrt(running_var + eps)``: the weight is multiplied by it. A training step
also divides by it, and takes ``1/σ`` where ``|γ/σ| < 1e-12``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype, as_now, operand
from tritonq.reference.operator import Like, operator

# Below this a fold counts as zero, so that squares of its ratio to the smallest scale stay normal in float32.
TINY_FOLD = 1e-12


def fold_scale(running_var: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """Return ``t = γ / sqrt(running_var + eps)``, (channels,) as the arguments; a γ of None counts as 1."""
    inverse = torch.rsqrt(running_var + operand(eps, running_var))
    return inverse if gamma is None else gamma * inverse


@operator(returns=(Like("running_var", "dtype"), Like("running_var", "dtype")), has_kernel=False, visible=True)
def nonzero_fold(running_var: Tensor, gamma: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the fold ``s = γ/σ``, or ``1/σ`` where ``|γ/σ| < 1e-12``, and ``1/σ``: (channels,) each, in ``dtype``.

    A training step divides by the fold, so it must not be zero. The variance is read as it is now: the step changes it
    before its backward.

    Args:
        running_var: (channels,).
        gamma: (channels,); no gradient reaches it. None for 1: both results are then the same tensor.
        eps: added to the variance.
        dtype: of the arithmetic and the results.
    """
    (running_var,) = as_now(running_var)
    inverse_std = fold_scale(as_dtype(running_var, dtype), None, eps)
    if gamma is None:
        return inverse_std, inverse_std
    fold = as_dtype(gamma.detach(), dtype) * inverse_std
    return torch.where(fold.abs() < operand(TINY_FOLD, fold), inverse_std, fold), inverse_std


def gamma_gradient(
    gamma: Tensor, fold: Tensor, inverse_std: Tensor, eps_share: Tensor, sum_gn: Tensor, dfold: Tensor
) -> Tensor:
    """Return the gradient of γ: ``n + dfold / σ - n · eps_share``, or n where ``|γ/σ| < 1e-12``.

    ``n = sum_gn · sign(s)``.

    Args:
        gamma: (channels,), as all others and the result, which has its dtype.
        fold: ``s`` of :func:`nonzero_fold`: ``γ/σ``, or ``1/σ`` where that is nearly 0.
        inverse_std: ``1/σ`` of :func:`nonzero_fold`.
        eps_share: ``eps / (var + eps)``, 0..1, with the batch's variance of the unfolded convolution.
        sum_gn: ``Σ g (c - mean) / std`` over the batch, with mean and std of c in it: g is the gradient behind the
            BatchNorm, c the folded convolution's output.
        dfold: gradient of ``s``.
    """
    direct = sum_gn * fold.sign()
    through_fold = dfold * inverse_std - direct * eps_share
    size = (gamma.detach() * inverse_std).abs()
    live = size >= operand(TINY_FOLD, size)
    return as_dtype(torch.where(live, direct + through_fold, direct), gamma.dtype)


@operator(returns=Like("running_var"), has_kernel=False)
def remembered(running_var: Tensor) -> Tensor:
    """Return a copy of the running variance, which compilers keep for the backward.

    It is an operator, which compilers don't see into: they would read the variance again in the backward, after it
    changed.
    """
    return running_var.clone()


def fold_bias(bias: Tensor | None, running_mean: Tensor, scale: Tensor, beta: Tensor | None) -> Tensor:
    """Return the bias of a folded convolution: ``β + (b - running_mean) t`` per channel; missing β and b count as 0.

    ``scale`` is t, the fold ``γ/σ`` of each channel. All are (channels,).
    """
    centred = -running_mean if bias is None else bias - running_mean
    return centred * scale if beta is None else beta + centred * scale


def scale_out_channels(weight: Tensor, scale: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """Return ``weight`` times ``scale`` (out,) per out channel.

    A convolution's weight is (out, in/groups, ...); a transposed one's (in, out/groups, ...), whose first axis has the
    in channels of all groups, one group after the other. ``groups`` is read for a transposed one only.
    """
    spatial = [1] * (weight.dim() - 2)
    if not transposed:
        return weight * scale.view(-1, 1, *spatial)
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (grouped * scale.view(groups, 1, -1, *spatial)).reshape(weight.shape)
