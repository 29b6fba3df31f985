"""Convolutions of 8-bit codes in integers: the specification of `tritonq.kernels.int8_conv` and the CPU path."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.reference.operator import New, operator

# Accumulators are 32 bits wide and saturate symmetrically.
ACCUMULATOR_MAX = 2**31 - 1
# Far outside of every 8-bit range, and yet 32 bits hold it shifted left by any fractional length.
_BEYOND_CODES = 2**14


def _output_shape(arguments: dict[str, Any]) -> tuple[int, ...]:
    x, weight = arguments["x"], arguments["weight"]
    geometry = zip(*(arguments[name] for name in ("stride", "padding", "dilation")), strict=True)
    sizes = (
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, (stride, padding, dilation) in zip(x.shape[2:], weight.shape[2:], geometry, strict=True)
    )
    return (x.shape[0], weight.shape[0], *sizes)


@operator(returns=New(_output_shape, "x", "out_dtype", keeps_format=True), mutates=("saturated",))
def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    quant_min: int,
    quant_max: int,
    out_dtype: torch.dtype,
    saturated: Tensor | None = None,
) -> Tensor:
    """Return ``acc = Σ x · weight + bias``, or with ``shift`` its codes ``clamp(round_half_even(acc · 2^-shift))``.

    All arithmetic is on integers.

    Args:
        x: int8 or uint8 codes (n, c, h, w).
        weight: int8 codes (out, c/groups, kh, kw).
        bias: int32 (out,).
        shift: int32 (out,), -8..16; None returns the accumulators, int32.
        stride: (vertical, horizontal), as are padding and dilation.
        padding: how many codes 0 are put on each side.
        dilation: distance between taps, 1 for neighbours.
        groups: 1, or c (depthwise).
        quant_min: smallest code of the result; like ``quant_max`` not read without ``shift``.
        quant_max: largest code of the result.
        out_dtype: int8, uint8, or int32 for accumulators.
        saturated: int64 (1,), to which the number of accumulators that were clamped to ±(2^31 - 1) is added. None: the
            caller knows that no sum passes 32 bits.

    Returns:
        (n, out, h', w') of ``out_dtype``.

    Source: docs/fixed-point.md.
    """
    wide = torch.int32 if saturated is None else torch.int64
    total = F.conv2d(x.to(wide), _dilated(weight, dilation).to(wide), None, stride, padding, 1, groups)
    total += bias.to(wide).view(1, -1, 1, 1)
    if saturated is not None:
        saturated += (total.abs() > ACCUMULATOR_MAX).sum()
        total = total.clamp_(-ACCUMULATOR_MAX, ACCUMULATOR_MAX).to(torch.int32)
    if shift is None:
        return total
    return requantize(total, shift.view(1, -1, 1, 1), quant_min, quant_max).to(out_dtype)


def _dilated(weight: Tensor, dilation: tuple[int, int]) -> Tensor:
    """Return the weight with zeros between its taps, since torch has no dilated convolution of integers."""
    if tuple(dilation) == (1, 1):
        return weight
    sizes = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilation, strict=True)]
    spread = weight.new_zeros(*weight.shape[:2], *sizes)
    spread[:, :, :: dilation[0], :: dilation[1]] = weight
    return spread


def requantize(accumulator: Tensor, shift: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Return ``clamp(round_half_even(accumulator * 2^-shift), quant_min, quant_max)`` by shifts of integers.

    The result is exact for codes of up to 8 bits: values are limited to ±2^14 before they are shifted to the left, so
    that 32 bits hold them.

    Args:
        accumulator: int32 or int64, any shape.
        shift: int32 that broadcasts against it: -16..30 (-16..62 for int64); a negative shift multiplies.
        quant_min: smallest code, at least -2^14.
        quant_max: largest code, at most 2^14.

    Returns:
        Codes in the dtype of ``accumulator``, in the shape that it and ``shift`` broadcast to.
    """
    right, left = shift.clamp(min=0).to(accumulator.dtype), (-shift).clamp(min=0).to(accumulator.dtype)
    code = accumulator >> right
    rest = accumulator - (code << right)
    half = (torch.ones_like(right) << right) >> 1
    code = code + ((rest > half) | ((rest == half) & (right > 0) & (code & 1 == 1)))
    return (code.clamp(-_BEYOND_CODES, _BEYOND_CODES) << left).clamp(quant_min, quant_max)
