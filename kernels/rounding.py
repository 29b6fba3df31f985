"""Rounding to a quantization grid, as device functions on loaded float32 values.

``v = x / scale`` is a value in steps of the grid; the *code* is ``round(v) + zero_point``, clipped to
QUANT_MIN..QUANT_MAX. Nothing here uses libdevice or fused multiply-adds, so that a GPU, Triton's interpreter and
PyTorch agree bit for bit. Launch kernels that call these with ``enable_fp_fusion=False``. `tritonq.kernels` explains
the constants that have no comment.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and subtracting 1.5 * 2^23 leaves no fraction bits: the hardware's own round-half-even, for |v| <= 2^22.
_ROUNDER = tl.constexpr(12582912.0)
# From here on float32 has no fraction bits.
_ALL_WHOLE = tl.constexpr(8388608.0)
# Code ranges that span less than this can be clamped before they are rounded.
NARROW_CODES = tl.constexpr(2**22)


@triton.jit
def round_half_even(v):
    """Return the nearest integer, ties to even, for |v| <= 2^22; NaN stays."""
    return (v + _ROUNDER) - _ROUNDER


@triton.jit
def round_half_even_any(v):
    """Return the nearest integer, ties to even, for any v; NaN and infinities stay."""
    rounder = tl.where(v < 0, -_ALL_WHOLE, _ALL_WHOLE)
    return tl.where(tl.abs(v) < _ALL_WHOLE, (v + rounder) - rounder, v)


@triton.jit
def round_half_away(v):
    """Return the nearest integer, ties away from zero, for any v; NaN and infinities stay."""
    size = tl.abs(v)
    whole = tl.floor(size)
    # Exact: the fraction of a float is a float. (floor(size + 0.5) would round 0.49999997 up.)
    size = tl.where(size - whole >= 0.5, whole + 1, whole)
    return tl.where(v < 0, -size, tl.where(v == v, size, v))


@triton.jit
def divide_by_scale(x, scale, ROUNDING: tl.constexpr):
    """Return ``x`` in steps of ``scale``: ``x · (1 / scale)`` for "half_even", as torch; else ``x / scale``.

    The reciprocal has the shape of ``scale``: it is computed once per tensor or channel, not per element.
    """
    if ROUNDING == "half_even":
        return x * tl.div_rn(1.0, scale)
    else:
        return tl.div_rn(x, tl.broadcast_to(scale, x.shape) if scale.type.is_block() else scale)


@triton.jit
def round_to_code(v, zero_point, QUANT_MIN: tl.constexpr, QUANT_MAX: tl.constexpr, ROUNDING: tl.constexpr):
    """Return the code of ``v``: ``clamp(round(v) + zero_point, QUANT_MIN, QUANT_MAX)`` as float32.

    Args:
        v: float32, a value over its scale, from :func:`divide_by_scale`. NaN stays NaN, infinities saturate.
        zero_point: float32 integer that broadcasts against ``v``, or the constant 0.
        QUANT_MIN: smallest code.
        QUANT_MAX: largest code.
        ROUNDING: of ties: ``"half_even"`` or ``"half_away"``.
    """
    if QUANT_MAX - QUANT_MIN < NARROW_CODES:
        return round_to_steps(v, zero_point, QUANT_MIN, QUANT_MAX, ROUNDING) + zero_point
    else:
        code = _round_any(v, ROUNDING) + zero_point
        return clamp(code, QUANT_MIN, QUANT_MAX)


@triton.jit
def round_to_steps(v, zero_point, QUANT_MIN: tl.constexpr, QUANT_MAX: tl.constexpr, ROUNDING: tl.constexpr):
    """Return ``code - zero_point`` as float32: the steps between zero and the code of ``v``.

    They are ``clamp(round(v), QUANT_MIN - zero_point, QUANT_MAX - zero_point)``; NaN stays. ``v`` is float32, a value
    over its scale; ``zero_point`` a float32 integer that broadcasts against ``v``, or the constant 0; ROUNDING, of
    ties, ``"half_even"`` or ``"half_away"``.
    """
    if QUANT_MAX - QUANT_MIN < NARROW_CODES:
        # Integer bounds and a monotone rounding: clamping first gives the same result without adding z per element.
        v = clamp(v, QUANT_MIN - zero_point, QUANT_MAX - zero_point)
        return round_half_even(v) if ROUNDING == "half_even" else round_half_away(v)
    else:
        return round_to_code(v, zero_point, QUANT_MIN, QUANT_MAX, ROUNDING) - zero_point


@triton.jit
def is_inside(v, zero_point, QUANT_MIN: tl.constexpr, QUANT_MAX: tl.constexpr, ROUNDING: tl.constexpr):
    """Whether ``round(v) + zero_point``, not clipped, lies in QUANT_MIN..QUANT_MAX; False at NaN and infinities.

    ``v`` is float32, a value over its scale; ``zero_point`` a float32 integer that broadcasts against ``v``, or the
    constant 0; ROUNDING, of ties, ``"half_even"`` or ``"half_away"``. The result is a bool block, shaped as ``v``.
    """
    if QUANT_MAX - QUANT_MIN < NARROW_CODES:
        steps = round_to_steps(v, zero_point, QUANT_MIN - 1, QUANT_MAX + 1, ROUNDING)
        return (steps >= QUANT_MIN - zero_point) & (steps <= QUANT_MAX - zero_point)
    else:
        code = _round_any(v, ROUNDING) + zero_point
        return (code >= QUANT_MIN) & (code <= QUANT_MAX)


@triton.jit
def clamp(v, low, high):
    """Return ``min(max(v, low), high)``; NaN stays.

    Not ``tl.clamp``, which the sanitizer triton-viz does not know; both compile to the same two instructions.
    """
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round_any(v, ROUNDING: tl.constexpr):
    if ROUNDING == "half_even":
        return round_half_even_any(v)
    else:
        return round_half_away(v)


@triton.jit
def nearest_power(value):
    """Return the power of two nearest to ``value`` > 0 on a logarithmic scale, clipped to 2^-24 .. 2^7, as float32.

    float16 holds all of these powers.
    """
    # Carries into the exponent from the square root of 2 on, which lies between two floats.
    rounded = value.to(tl.int32, bitcast=True) + (0x800000 - 0x3504F4)
    exponent = tl.minimum(tl.maximum(rounded >> 23, 127 - 24), 127 + 7)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_to_float(v, MANTISSA_BITS: tl.constexpr, LEAST_EXPONENT: tl.constexpr, LIMIT: tl.constexpr):
    """Return the nearest number of a small float format, ties to even; NaN and the sign of zero stay.

    Adding and subtracting a power of two whose last mantissa bit is the format's leaves the rounded number.

    Args:
        v: float32.
        MANTISSA_BITS: number of mantissa bits of the format.
        LEAST_EXPONENT: exponent of its smallest normal number.
        LIMIT: larger magnitudes, infinity too, become this one: the format's largest finite number, or the number that
            would follow it (to see what overflows). FP8 E4M3 has 3 mantissa bits, least exponent -6, limit 448 or 480.
    """
    # NaN stays NaN, whatever its exponent bits make of the rounder.
    size = tl.minimum(tl.abs(v), LIMIT, propagate_nan=tl.PropagateNan.ALL)
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) & 0x7F800000, (LEAST_EXPONENT + 127) << 23)
    rounder = (exponent + ((23 - MANTISSA_BITS) << 23)).to(tl.float32, bitcast=True)
    size = (size + rounder) - rounder
    sign = v.to(tl.int32, bitcast=True) & -0x80000000
    return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
