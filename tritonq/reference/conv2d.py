"""Convolutions with ReLU and fake quantization: the specification of `tritonq.kernels.conv2d`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.arithmetic import round_steps_
from tritonq.granularity import Granularity
from tritonq.grid import Grid
from tritonq.reference.activation import rectify
from tritonq.reference.fake_quant import fake_quantize


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    ceiling: float | None = None,
    grid: Grid | None = None,
) -> Tensor:
    """Return ``FQ(relu?(conv(x, weight) + bias))``, where FQ rounds to ``grid``.

    Args:
        x: (n, c, h, w).
        weight: (out, c/groups, kh, kw) in the dtype of ``x``; fake-quantized by the caller.
        bias: (out,) in the dtype of ``x``, or None.
        stride: (vertical, horizontal), as are padding and dilation.
        padding: zeros on each side.
        dilation: between taps.
        groups: groups of channels.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.
        grid: of the output, per tensor; None, or switched off: the output is not rounded.

    Returns:
        (n, out, h', w') in ``x``'s dtype. float16 and bfloat16 are rounded once before the quantizer.
    """
    return _finished(F.conv2d(x, weight, bias, stride, padding, dilation, groups), ceiling, grid)


def integer_conv2d(
    codes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    onto: Grid | None,
    dtype: torch.dtype,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    ceiling: float | None = None,
    grid: Grid | None = None,
) -> Tensor:
    """Return ``FQ(relu?(v))`` with ``v = fl(conv(codes, weight) + bias) · multiplier`` and an exact sum.

    With ``onto``, of scale s, ``multiplier`` gives v in steps of s, and ``round(v) · s``, not clipped, takes its place
    before the ReLU; fl rounds to float32.

    Args:
        codes: (n, c, h, w) integers of up to 9 bits, minus their zero point, in any float dtype.
        weight: (out, c/groups, kh, kw), integers minus their zero points, in any float dtype. No partial sum may reach
            2^24, which is not checked.
        bias: int32 (out,), which is added to the sums; None: none.
        multiplier: float32 (out,), by which the sums are multiplied: values per unit of the sums, or steps of ``onto``.
        onto: grid per tensor, to multiples of whose scale v is rounded; None: v is not rounded here. It is the grid of
            the quantizer behind the layer, which engines round the sums to directly.
        dtype: of the result.
        stride: (vertical, horizontal), as are padding and dilation.
        padding: zeros on each side.
        dilation: between taps.
        groups: groups of channels.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.
        grid: of the output, per tensor, to which FQ rounds; None, or switched off: no fake quantization.

    Returns:
        (n, out, h', w') of ``dtype``, to which v is rounded before the ReLU.
    """
    # Rounding takes back the fractions of Winograd and FFT algorithms.
    total = F.conv2d(codes.double(), weight.double(), None, stride, padding, dilation, groups).round_()
    y = requantize(total, bias, multiplier, onto, channel_axis=1)
    return _finished(y.to(dtype), ceiling, grid)


def requantize(total: Tensor, bias: Tensor | None, multiplier: Tensor, onto: Grid | None, channel_axis: int) -> Tensor:
    """Return ``v = float32(total + bias) · multiplier``, or with a grid ``round(v) · onto.scale``, not yet clipped.

    Args:
        total: the exact integer sums, float32 or float64; may be overwritten.
        bias: int32 (out,), or None.
        multiplier: float32 (out,): values per unit of the sums; with ``onto`` steps of its scale.
        onto: the grid, per tensor, to multiples of whose scale v is rounded, ties as ``onto.qtype.rounding`` says;
            None: v is not rounded.
        channel_axis: axis of ``total`` with the out channels.

    Returns:
        float32, shaped as ``total``.
    """
    align, dimensions = Granularity(channel_axis).align, total.dim()
    if bias is not None:
        # float32 sums of a float32 accumulator and a bias code would round once too often above 2^24.
        total = (total.double() + align(bias, dimensions)).float()
    y = total.float().mul_(align(multiplier, dimensions))
    if onto is None:
        return y
    return round_steps_(y, onto.qtype.rounding).mul_(onto.scale)


def _finished(y: Tensor, ceiling: float | None, grid: Grid | None) -> Tensor:
    y = rectify(y, ceiling)
    return y if grid is None else fake_quantize(y, grid)
