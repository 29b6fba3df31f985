"""Folding BatchNorm into the convolution before it, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_scale(running_var: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """``t = γ / sqrt(running_var + eps)`` per channel; a missing γ counts as 1."""
    inverse = torch.rsqrt(running_var + eps)
    return inverse if gamma is None else gamma * inverse


def fold_bias(bias: Tensor | None, running_mean: Tensor, scale: Tensor, beta: Tensor | None) -> Tensor:
    """``β + (b - running_mean) t`` per channel; missing β and b count as 0."""
    centred = -running_mean if bias is None else bias - running_mean
    return centred * scale if beta is None else beta + centred * scale


def scale_out_channels(weight: Tensor, scale: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """``weight`` times ``scale`` per out channel.

    A convolution's weight is (out, in/groups, ...); a transposed one's (in, out/groups, ...), where the in channels of
    group g meet its own out channels alone.
    """
    spatial = [1] * (weight.dim() - 2)
    if not transposed:
        return weight * scale.view(-1, 1, *spatial)
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (grouped * scale.view(groups, 1, -1, *spatial)).reshape(weight.shape)
