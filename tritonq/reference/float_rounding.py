"""Rounding to floating point formats of few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.formats import FloatFormat

# For each dtype of the arithmetic: integers of its width, its mantissa bits, and the bias of its exponent.
_BITS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


def round_to_float_(values: Tensor, number: FloatFormat, largest: float | None = None) -> Tensor:
    """Round to the nearest number of a float format, in place, ties to even; larger values saturate. Return ``values``.

    Adding and subtracting a power of two whose last mantissa bit is the format's leaves the rounded number. NaN stays,
    and so does the sign of zero.

    Args:
        values: float32 or float64, any shape.
        number: the format.
        largest: a number of the format: larger magnitudes, infinity too, become this one. None: the format's largest
            finite value.
    """
    integers, mantissa_bits, bias = _BITS[values.dtype]
    size = values.abs().clamp_(max=number.largest if largest is None else largest)
    exponent = size.view(integers) >> mantissa_bits
    exponent.clamp_(min=number.least_exponent + bias).add_(mantissa_bits - number.mantissa_bits)
    rounder = exponent.bitwise_left_shift_(mantissa_bits).view(values.dtype)
    return torch.copysign(size.add_(rounder).sub_(rounder), values, out=values)


def codes_of_floats(values: Tensor, number: FloatFormat) -> Tensor:
    """Return the codes of numbers of a float format, int8: n for the n-th smallest positive one, -n for its opposite.

    Both zeros have the code 0.

    Args:
        values: float32 or float64 numbers of the format, any shape.
        number: the format.

    Examples:
        >>> from tritonq.formats import FLOAT_FORMATS
        >>> codes_of_floats(torch.tensor([-6.0, 0.0, 0.5, 1.0, 1.5, 2.0]), FLOAT_FORMATS["e2m1"])
        tensor([-7,  0,  1,  2,  3,  4], dtype=torch.int8)
    """
    size = values.abs()
    exponent = (torch.frexp(size).exponent - 1).clamp_(min=number.least_exponent)
    exponent = torch.where(size == 0, number.least_exponent, exponent)
    steps = torch.ldexp(size, number.mantissa_bits - exponent)
    codes = steps + ((exponent - number.least_exponent) << number.mantissa_bits)
    return torch.where(values < 0, -codes, codes).to(torch.int8)


def floats_of_codes(codes: Tensor, number: FloatFormat) -> Tensor:
    """Return the numbers of a float format that codes stand for, float32: the inverse of :func:`codes_of_floats`.

    Args:
        codes: integers of any dtype: n for the n-th smallest positive number of the format, -n for its
            opposite. That the format has so many is not checked.
        number: the format.

    Examples:
        >>> from tritonq.formats import FLOAT_FORMATS
        >>> floats_of_codes(torch.tensor([-126, 0, 1, 126], dtype=torch.int8), FLOAT_FORMATS["e4m3"])
        tensor([-4.4800e+02,  0.0000e+00,  1.9531e-03,  4.4800e+02])
    """
    size = codes.int().abs()
    exponent = ((size >> number.mantissa_bits) - 1).clamp_(min=0)
    steps = (size - (exponent << number.mantissa_bits)).float()
    values = torch.ldexp(steps, exponent + number.least_exponent - number.mantissa_bits)
    return torch.where(codes < 0, -values, values)
