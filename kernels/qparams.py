"""Scale and zero point of a range, computed on the device: `tritonq.qparams.range_to_qparams`, bit for bit.

`tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import round_half_away, round_half_even_any

# torch's fused operator widens the range below this scale, and gives this one to a range that is empty or tiny.
_V1_SMALL_SCALE = tl.constexpr(6.1e-5)
_V1_ZERO_RANGE_SCALE = tl.constexpr(0.1)
# 2^-128, the largest float32 whose reciprocal is infinite in float32.
_V1_NO_RECIPROCAL = tl.constexpr(2.0**-128)
# The smallest normal float64.
_TINY64 = tl.constexpr(2.2250738585072014e-308)
# 1.5 * 2^52: adding and subtracting it leaves no fraction bits in a float64 below 2^51.
_ROUNDER64 = tl.constexpr(6755399441055744.0)


@triton.jit
def range_to_qparams(
    min_val,
    max_val,
    eps,  # smallest scale
    QUANT_MIN: tl.constexpr,  # smallest code
    QUANT_MAX: tl.constexpr,  # largest code
    SYMMETRIC: tl.constexpr,  # whether the range is made symmetric; read by "torch_v1" only
    FIXED_ZERO_POINT: tl.constexpr,  # the zero point that the type fixes; None: it is computed
    RULE: tl.constexpr,  # "torch", "torch_v1" or "megengine": see `tritonq.qparams`
):
    """Return scale (float32) and zero point (int32) of the ranges ``min_val`` to ``max_val`` (float32 blocks).

    The range is first widened to contain 0. One that is empty or not finite gives scale 1 and the type's zero point, or
    0 clipped to the codes.

    - "torch", "megengine" with a fixed zero point: ``scale = max(max(-min, max) / (codes / 2), eps)``.
    - "torch", "megengine" without: ``scale = max((max - min) / codes, eps)``, ``zero_point = QUANT_MIN - round(min /
      scale)``; "torch" rounds ties to even and clips it to the codes, "megengine" rounds them away from zero.
    - "torch_v1": mostly in float64, as torch's fused moving-average operator; eps is not read, and FIXED_ZERO_POINT
      only for ranges that are empty or not finite.

    ``codes = QUANT_MAX - QUANT_MIN``.
    """
    observed = (min_val <= max_val) & (tl.abs(min_val) < float("inf")) & (tl.abs(max_val) < float("inf"))
    low = tl.minimum(tl.where(observed, min_val, 0.0), 0.0)
    high = tl.maximum(tl.where(observed, max_val, 0.0), 0.0)
    if RULE == "torch_v1":
        scale, zero_point = _torch_v1_qparams(low, high, QUANT_MIN, QUANT_MAX, SYMMETRIC)
    else:
        scale, zero_point = _linear_qparams(low, high, eps, QUANT_MIN, QUANT_MAX, FIXED_ZERO_POINT, RULE)
    unobserved: tl.constexpr = _unobserved_zero_point(QUANT_MIN, QUANT_MAX, FIXED_ZERO_POINT)
    return tl.where(observed, scale, 1.0), tl.where(observed, zero_point, unobserved).to(tl.int32)


@triton.constexpr_function
def _unobserved_zero_point(quant_min, quant_max, fixed_zero_point):
    return min(max(fixed_zero_point or 0, quant_min), quant_max)


@triton.constexpr_function
def _magnitude(value):
    return abs(value)


@triton.jit
def _linear_qparams(
    low,
    high,
    eps,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    FIXED_ZERO_POINT: tl.constexpr,
    RULE: tl.constexpr,
):
    """Return scale and zero point by the rules "torch" (torch.ao's observers) and "megengine", as float32.

    With a fixed zero point ``scale = max(-low, high) / (codes / 2)``. Else ``scale = (high - low) / codes`` and
    ``zero_point = QUANT_MIN - round(low / scale)``; ``codes = QUANT_MAX - QUANT_MIN``. Scales are at least eps.
    """
    codes: tl.constexpr = QUANT_MAX - QUANT_MIN
    if FIXED_ZERO_POINT is not None:
        scale = tl.maximum(tl.div_rn(tl.maximum(-low, high), tl.full(low.shape, codes / 2, tl.float32)), eps)
        return scale, tl.full(low.shape, FIXED_ZERO_POINT, tl.float32)
    else:
        scale = tl.maximum(tl.div_rn(high - low, tl.full(low.shape, codes, tl.float32)), eps)
        ratio = tl.div_rn(low, scale)
        if RULE == "megengine":
            return scale, QUANT_MIN - round_half_away(ratio)
        else:
            zero_point = QUANT_MIN - round_half_even_any(ratio)
            return scale, tl.minimum(tl.maximum(zero_point, QUANT_MIN), QUANT_MAX)


@triton.jit
def _torch_v1_qparams(low, high, QUANT_MIN: tl.constexpr, QUANT_MAX: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Return scale and zero point, float32, as torch's fused moving-average operator computes them, mostly in float64.

    ``scale = (high - low) / codes`` with ``codes = QUANT_MAX - QUANT_MIN``. If SYMMETRIC and the range has values of
    both signs, it is widened first: ``scale = max(-low / (codes // 2 + 1), high / (codes // 2))``, with the middle code
    as zero point. A scale of at most 2^-128 becomes 0.1, another one below 6.1e-5 becomes that. The zero point follows
    from the end of the range that is represented with the smaller error.
    """
    codes: tl.constexpr = QUANT_MAX - QUANT_MIN
    if SYMMETRIC:
        # In float32, as the operator divides: a tiny range becomes 0.
        below: tl.constexpr = codes // 2 + 1
        above: tl.constexpr = codes // 2
        two_sided = (low < 0) & (high > 0)
        widest = tl.div_rn(-low, tl.full(low.shape, below, tl.float32))
        widest = tl.maximum(widest, tl.div_rn(high, tl.full(low.shape, above, tl.float32)) if above != 0 else high)
        low = tl.where(two_sided, -widest * below, low)
        high = tl.where(two_sided, widest * above, high)
    low = low.to(tl.float64)
    high = high.to(tl.float64)

    step = (high - low) / codes
    scale = step.to(tl.float32).to(tl.float64)
    # A bare Python number would reach the comparison as float32.
    small_scale = tl.full(low.shape, _V1_SMALL_SCALE, tl.float64)
    is_tiny = scale <= tl.full(low.shape, _V1_NO_RECIPROCAL, tl.float64)
    scale = tl.where(is_tiny, tl.full(low.shape, _V1_ZERO_RANGE_SCALE, tl.float64), scale)
    small = scale < small_scale
    scale = tl.where(small, small_scale, scale)
    grow_high = low == 0
    grow_low = high == 0
    both = (low < 0) & (high > 0)
    amplifier = small_scale / tl.maximum(step, tl.full(low.shape, _TINY64, tl.float64))
    small_range = small_scale * codes
    high = tl.where(small & grow_high, small_range, tl.where(small & both, high * amplifier, high))
    low = tl.where(small & grow_low, -small_range, tl.where(small & both, low * amplifier, low))

    error_min = tl.abs(low / scale) + _magnitude(QUANT_MIN)
    error_max = tl.abs(high / scale) + _magnitude(QUANT_MAX)
    zero_point = tl.where(error_min < error_max, QUANT_MIN - low / scale, QUANT_MAX - high / scale)
    if SYMMETRIC:
        zero_point = tl.where(both, (QUANT_MIN + QUANT_MAX + 1) // 2, zero_point)
    zero_point = (zero_point + _ROUNDER64) - _ROUNDER64
    return scale.to(tl.float32), tl.minimum(tl.maximum(zero_point, QUANT_MIN), QUANT_MAX).to(tl.float32)
