"""Folding BatchNorm into the convolution before it, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype, as_now, operand
from tritonq.reference.operator import Like, operator

# Below this a fold counts as zero, so that squares of its ratio to the smallest scale stay normal in float32.
TINY_FOLD = 1e-12


def fold_scale(running_var: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """Return ``t = γ / sqrt(running_var + eps)`` per channel; a missing γ counts as 1."""
    inverse = torch.rsqrt(running_var + operand(eps, running_var))
    return inverse if gamma is None else gamma * inverse


@operator(returns=(Like("running_var", "dtype"), Like("running_var", "dtype")), has_kernel=False, visible=True)
def nonzero_fold(running_var: Tensor, gamma: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``s = γ/σ(running_var)``, or ``1/σ`` where that is zero, and ``1/σ``: (channels,), in ``dtype``.

    Of the variance as it is now: a training step changes it before its backward pass.
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
    """Return ``dγ = Σ g x̂ + (dfold - (γ/s) Σ g x̂ · eps_share) / σ``, without the bracket where γ is zero.

    Args:
        gamma: (channels,), as the rest.
        fold: ``s`` of :func:`nonzero_fold`.
        inverse_std: ``1/σ`` of it.
        eps_share: see :class:`tritonq.reference.conv_bn.Normalization`.
        sum_gn: see :class:`tritonq.reference.conv_bn.TailGradients`.
        dfold: gradient of ``s``.
    """
    direct = sum_gn * fold.sign()
    through_fold = dfold * inverse_std - direct * eps_share
    size = (gamma.detach() * inverse_std).abs()
    live = size >= operand(TINY_FOLD, size)
    return as_dtype(torch.where(live, direct + through_fold, direct), gamma.dtype)


@operator(returns=Like("running_var"), has_kernel=False)
def remembered(running_var: Tensor) -> Tensor:
    """Return a copy. An operator, which compilers don't see into: they would make the copy again in a backward pass."""
    return running_var.clone()


def fold_bias(bias: Tensor | None, running_mean: Tensor, scale: Tensor, beta: Tensor | None) -> Tensor:
    """Return ``β + (b - running_mean) t`` per channel; missing β and b count as 0."""
    centred = -running_mean if bias is None else bias - running_mean
    return centred * scale if beta is None else beta + centred * scale


def scale_out_channels(weight: Tensor, scale: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """Return ``weight`` times ``scale`` per out channel.

    A convolution's weight is (out, in/groups, ...); a transposed one's (in, out/groups, ...), where the in channels of
    group g meet its own out channels alone.
    """
    spatial = [1] * (weight.dim() - 2)
    if not transposed:
        return weight * scale.view(-1, 1, *spatial)
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (grouped * scale.view(groups, 1, -1, *spatial)).reshape(weight.shape)
