"""Rounding to floating point formats of few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.formats import FloatFormat

# For each dtype of the arithmetic: integers of its width, its mantissa bits, and the bias of its exponent.
_BITS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


def round_to_float_(values: Tensor, number: FloatFormat, largest: float | None = None) -> Tensor:
    """Round to the nearest number of the format, ties to even; larger values saturate. Overwrites ``values``.

    Adding and subtracting a power of two whose last mantissa bit is the format's leaves the rounded number. NaN stays,
    and so does the sign of zero.

    Args:
        values: float32 or float64, any shape.
        number: the format.
        largest: where values saturate; None: at the format's largest finite value.
    """
    integers, mantissa_bits, bias = _BITS[values.dtype]
    size = values.abs().clamp_(max=number.largest if largest is None else largest)
    exponent = size.view(integers) >> mantissa_bits
    exponent.clamp_(min=number.least_exponent + bias).add_(mantissa_bits - number.mantissa_bits)
    rounder = exponent.bitwise_left_shift_(mantissa_bits).view(values.dtype)
    return torch.copysign(size.add_(rounder).sub_(rounder), values, out=values)
