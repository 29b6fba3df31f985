"""Folded convolutions with ReLU and fake quantization: the specification of `tritonq.kernels.conv2d`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.qparams import QuantizedType, Rounding, round_half_away
from tritonq.reference.activation import rectify
from tritonq.reference.fake_quant import fake_quantize


class OutputQuantizer(NamedTuple):
    """A per-tensor quantizer that observes nothing and has seen data.

    Attributes:
        scale: float32, one element.
        zero_point: int32, one element; None stands for zero.
        active: uint8, one element; 0 passes values through. None counts as 1.
        qtype: the grid.
    """

    scale: Tensor
    zero_point: Tensor | None
    active: Tensor | None
    qtype: QuantizedType


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    ceiling: float | None = None,
    quantizer: OutputQuantizer | None = None,
) -> Tensor:
    """``FQ(relu?(conv(x, weight) + bias))``.

    Args:
        x: (n, c, h, w).
        weight: (out, c/groups, kh, kw) of the same dtype, quantized already.
        bias: (out,), or None.
        stride: (vertical, horizontal), as are padding and dilation.
        padding: zeros on each side.
        dilation: between taps.
        groups: groups of channels.
        ceiling: of the ReLU; see :func:`tritonq.reference.activation.rectify`.
        quantizer: of the output; None leaves it as it is.

    Returns:
        (n, out, h', w') in ``x``'s dtype. float16 and bfloat16 are rounded once before the quantizer.
    """
    return _finished(F.conv2d(x, weight, bias, stride, padding, dilation, groups), ceiling, quantizer)


def integer_conv2d(
    codes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    grid_scale: Tensor | None,
    rounding: Rounding,
    dtype: torch.dtype,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    ceiling: float | None = None,
    quantizer: OutputQuantizer | None = None,
) -> Tensor:
    """``FQ(relu?(requantize(conv(codes, weight))))`` with an exact sum; geometry and the end as :func:`conv2d`.

    Args:
        codes: (n, c, h, w) integers of up to 9 bits, minus their zero point, in any float dtype.
        weight: (out, c/groups, kh, kw), the same. No partial sum may reach 2^24.
        bias: see :func:`requantize`, as are multiplier, grid_scale and rounding.
        multiplier: (out,).
        grid_scale: one element, or None.
        rounding: onto that grid.
        dtype: of the result.
        stride: (vertical, horizontal), as are padding and dilation.
        padding: zeros on each side.
        dilation: between taps.
        groups: groups of channels.
        ceiling: of the ReLU; see :func:`tritonq.reference.activation.rectify`.
        quantizer: of the output, or None.
    """
    # Rounding takes back the fractions of Winograd and FFT algorithms.
    total = F.conv2d(codes.double(), weight.double(), None, stride, padding, dilation, groups).round_()
    y = requantize(total, bias, multiplier, grid_scale, rounding, channel_axis=1)
    return _finished(y.to(dtype), ceiling, quantizer)


def requantize(
    total: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    grid_scale: Tensor | None,
    rounding: Rounding,
    channel_axis: int,
) -> Tensor:
    """``float32(total + bias) * multiplier``; with a grid ``round(that) * grid_scale``, before clipping.

    Args:
        total: exact integers, float32 or float64; may be overwritten.
        bias: int32 (out,), or None.
        multiplier: float32 (out,); with a grid, in units of ``grid_scale``.
        grid_scale: float32, one element, or None.
        rounding: onto the grid.
        channel_axis: of ``total``, which ``bias`` and ``multiplier`` run along.

    Returns:
        float32, shaped as ``total``.
    """
    shape = [1] * total.dim()
    shape[channel_axis] = -1
    if bias is not None:
        # float32 sums of a float32 accumulator and a bias code would round once too often above 2^24.
        total = (total.double() + bias.view(shape)).float()
    y = total.float().mul_(multiplier.view(shape))
    if grid_scale is None:
        return y
    return (y.round_() if rounding == "half_even" else round_half_away(y)).mul_(grid_scale)


def _finished(y: Tensor, ceiling: float | None, quantizer: OutputQuantizer | None) -> Tensor:
    y = rectify(y, ceiling)
    if quantizer is None:
        return y
    scale, zero_point, active, qtype = quantizer
    return fake_quantize(y, scale, zero_point, qtype.quant_min, qtype.quant_max, None, qtype.rounding, active=active)
