"""Mean and variance of a batch per channel, differentiably."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.functional.differentiable_once import differentiable_once
from tritonq.reference.conv_bn import dense, moments


def channel_moments(c: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per channel (axis 1): (channels,) each, float32 or wider; differentiable.

    For the backward only ``c`` and the mean are kept.

    Args:
        c: (batch, channels, ...), any float dtype; float16 and bfloat16 are computed in float32.

    Raises:
        ValueError: fewer than two values per channel.
    """
    check_count(c)
    mean, var = _ChannelMoments.apply(c)  # type: ignore[no-untyped-call]
    return mean, var


def check_count(c: Tensor) -> None:
    """Raise ValueError unless each channel (axis 1) has at least two values."""
    if c.numel() < 2 * c.shape[1]:
        raise ValueError(f"expected more than one value per channel when training, got an output of {tuple(c.shape)}")


class _ChannelMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor) -> tuple[Tensor, Tensor]:
        mean, var, _ = moments(dense(c.to(torch.promote_types(c.dtype, torch.float32))))
        ctx.save_for_backward(c, mean)
        return mean, var

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> Tensor:
        c, mean = ctx.saved_tensors
        count = c.numel() // c.shape[1]
        shape = [1, -1] + [1] * (c.dim() - 2)
        slope, centre = (2 / count) * dvar, dmean / count
        # dmean / n + dvar · 2 (c - mean) / n
        dc = torch.addcmul((centre - slope * mean).view(shape), c, slope.view(shape))
        return dc.to(c.dtype)
