"""The end of an operator that computes an activation: observe its range, then ReLU and fake quantization.

The ReLU is one constant, CEILING: infinity for a plain ReLU, 6 for ReLU6, None for no ReLU. Fake quantization is
``FQ(y) = (clip(round(y / scale) + zero_point) - zero_point) · scale``, with the clip to QUANT_MIN..QUANT_MAX. See
`tritonq.reference.activation`.

The range kernel is one program. It merges the ranges that other programs found, updates the quantizer's state, and
writes a snapshot (a copy of scale, zero point and switch) for the passes that follow and for the backward. The host
therefore never waits for the device. To *merge* is to take the extremes of all batches, or with an averaging constant
``running + constant · (batch - running)``; the first batch replaces the empty range. `tritonq.kernels` explains the
constants that have no comment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached_launch import Launcher
from .constants import INF
from .min_max import update_range
from .quantized import Grid, RangeStatistics, has_data, observing_switch, range_constants, switch_of
from .rounding import NARROW_CODES, clamp, divide_by_scale, round_half_away, round_half_even, round_to_steps

_RANGE_BLOCK = 1024


@triton.jit
def quantize_value(
    y,  # float32 block, before the ReLU
    scale,  # float32 scalar
    zero_point,  # float32 scalar, or 0
    active,  # scalar; 0 leaves values unrounded
    CEILING: tl.constexpr,
    QUANTIZED: tl.constexpr,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Return ``FQ(relu?(y))`` of float32 values.

    The ReLU is applied if CEILING is not None. Fake quantization is applied if QUANTIZED, and if ``active`` is not 0;
    ROUNDING names how it rounds ties: ``"half_even"`` or ``"half_away"``. NaN stays.
    """
    if not QUANTIZED:
        return rectify(y, CEILING)
    elif QUANT_MAX - QUANT_MIN < NARROW_CODES:
        # Whatever does not depend on y, the switch and the ceiling too, is a scalar: values have no work from it.
        rounds = active != 0
        unit = tl.where(rounds, scale, 1.0)
        low = tl.where(rounds, tl.full([], QUANT_MIN, tl.float32) - zero_point, -INF)
        high = tl.where(rounds, tl.full([], QUANT_MAX, tl.float32) - zero_point, INF)
        if CEILING is not None:
            low = tl.maximum(low, 0.0)
            if CEILING < INF:
                # Division and rounding keep order: clipping afterwards, at what becomes of the ceiling, is the same.
                high = tl.minimum(high, divide_by_scale(tl.full([], CEILING, tl.float32), unit, ROUNDING))
        v = clamp(divide_by_scale(y, unit, ROUNDING), low, high)
        return tl.where(rounds, round_half_even(v) if ROUNDING == "half_even" else round_half_away(v), v) * unit
    else:
        y = rectify(y, CEILING)
        steps = round_to_steps(divide_by_scale(y, scale, ROUNDING), zero_point, QUANT_MIN, QUANT_MAX, ROUNDING)
        return tl.where(active != 0, steps * scale, y)


@triton.jit
def rectify(y, CEILING: tl.constexpr):
    """Return ``min(max(y, 0), CEILING)``; ``y`` if CEILING is None; NaN stays."""
    if CEILING is not None:
        y = clamp(y, 0.0, CEILING) if CEILING < INF else tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return y


@triton.jit
def gradient_bounds(
    scale,  # float32 scalar
    zero_point,  # float32 scalar, or 0
    active,  # scalar; 0: the quantizer is off and blocks nothing
    CEILING: tl.constexpr,
    QUANTIZED: tl.constexpr,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Return three scalars ``(unit, low, high)``, by which :func:`gradient_passes` compares ``low < y / unit < high``.

    ``y`` are the values before ReLU and rounding. With a ReLU it checks ``y > 0`` in place of ``low < y / unit``.
    ``unit`` is ``scale``; ``low`` lies half a step below the smallest code, ``high`` half a step above the largest,
    both in steps from the zero point. Where a value at such a bound is a tie that rounds to that code, the bound is one
    float further out. A finite CEILING replaces ``high`` if ``CEILING / scale`` is lower: ``unit`` is then 1, and
    ``low`` must not be read. Without QUANTIZED the result is a placeholder that nothing reads.

    If ``active`` is 0, the quantizer blocks nothing, infinities neither:

    - Without a ReLU ``high`` is NaN, which no value reaches.
    - With a plain one ``high`` and ``unit`` are infinite: quotients are 0, or NaN of infinity.
    - With a finite CEILING that is ``high``, and ``unit`` is 1.
    """
    if not QUANTIZED:
        return 1.0, 0.0, 0.0
    else:
        low = tl.full([], QUANT_MIN - 0.5, tl.float32) - zero_point
        high = tl.full([], QUANT_MAX + 0.5, tl.float32) - zero_point
        if ROUNDING == "half_even":
            zero = tl.full([], 0, tl.int32) + zero_point
            if QUANT_MAX - QUANT_MIN < 2**23:
                zero = zero.to(tl.int32)
                low_tie = 1 - (tl.abs(QUANT_MIN - zero) % 2)
                high_tie = 1 - (tl.abs(QUANT_MAX - zero) % 2)
            else:
                # float32 has no fraction bits out there: the bound itself is a code, inside at the low end alone.
                low_tie = tl.full([], 1, tl.int32)
                high_tie = tl.full([], 0, tl.int32)
            # low is negative and high positive: the next float outwards has the next larger bits.
            low = (low.to(tl.int32, bitcast=True) + low_tie).to(tl.float32, bitcast=True)
            high = (high.to(tl.int32, bitcast=True) + high_tie).to(tl.float32, bitcast=True)
        high = tl.where(active != 0, high, float("nan") if CEILING is None else INF)
        unit = tl.where(active != 0, scale, INF)
        TOP: tl.constexpr = INF if CEILING is None else CEILING
        if TOP < INF:
            # Division keeps order: what is below a ceiling inside of the last code is inside too, and the other way
            # round. Values themselves are compared with the ceiling, since several may have its quotient.
            ceiling = tl.full([], TOP, tl.float32)
            is_lower = (divide_by_scale(ceiling, scale, ROUNDING) < high) | (high == INF)
            unit = tl.where(is_lower, 1.0, scale)
            high = tl.where(is_lower, ceiling, high)
        return unit, low, high


@triton.jit
def gradient_passes(y, unit, low, high, CEILING: tl.constexpr, QUANTIZED: tl.constexpr, ROUNDING: tl.constexpr):
    """Return a bool block: where neither ReLU nor the clip blocks the gradient of :func:`quantize_value`.

    Each of the two that there is, and that is not switched off, blocks NaN. ``y``, float32, holds the values before
    ReLU and rounding; ``unit``, ``low`` and ``high`` come from :func:`gradient_bounds`. QUANTIZED: whether there is a
    quantizer; without one only the ReLU blocks, and the bounds are not read.
    """
    if QUANTIZED:
        v = divide_by_scale(y, unit, ROUNDING)
        # Zero is on every grid: no positive value lies below the first code. What a lower bound blocks goes where the
        # upper one blocks it, since two flags per value cost registers. NaN does not reach `high`: a quotient is NaN
        # only while the quantizer is off.
        return (tl.where((v > low) if CEILING is None else (y > 0), v, INF) >= high) == 0
    elif CEILING is None:
        return (y == y) | (y != y)
    elif CEILING < INF:
        return (y > 0) & (y < CEILING)
    else:
        return y > 0


@Launcher
@triton.jit
def range_kernel(
    low_ptr,  # (parts,) float32: smallest value of each part; a part with a NaN or infinite end is left out
    high_ptr,  # (parts,) float32: largest value of each part; a part with a NaN or infinite end is left out
    nonfinite_ptr,  # one int64, grows by `weight` for each part left out; this, min_ptr and max_ptr: None without range
    observing_ptr,  # one uint8; None or 0 leaves the range, scale, zero point and count as they are
    switch_ptr,  # one uint8: whether fake quantization is on
    min_ptr,  # one float32, updated in place
    max_ptr,  # one float32, updated in place
    scale_ptr,  # one float32, updated in place
    zero_point_ptr,  # one int32, updated in place; None stands for zero
    scale_out,  # one float32: a copy
    zero_point_out,  # one int32: a copy; None without a zero point
    active_out,  # one uint8: whether values are to be rounded
    averaging_constant,  # weight of the new range; None keeps the smallest and largest value of all batches
    eps,  # smallest scale
    parts,  # how many ranges there are to merge
    weight,  # values in a part
    CEILING: tl.constexpr,
    KNOWN: tl.constexpr,  # whether the range holds data for sure; if not, an empty one switches rounding off
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED_ZERO_POINT: tl.constexpr,
    RULE: tl.constexpr,
    COPY_ABOVE: tl.constexpr,
    BLOCK: tl.constexpr,  # parts read at a time
):
    """Merge the ranges of all parts into the running range, and write a copy of scale, zero point and switch.

    One program does it all. The ReLU, if there is one, is applied to the ends of the batch's range before that is
    merged.
    """
    if observing_ptr is not None and tl.load(observing_ptr) != 0:
        lows = tl.full([BLOCK], INF, tl.float32)
        highs = tl.full([BLOCK], -INF, tl.float32)
        nonfinite = tl.zeros([BLOCK], tl.int32)
        for start in range(0, parts, BLOCK):
            part = start + tl.arange(0, BLOCK)
            mask = part < parts
            low = tl.load(low_ptr + part, mask=mask, other=0.0)
            high = tl.load(high_ptr + part, mask=mask, other=0.0)
            finite = (tl.abs(low) < INF) & (tl.abs(high) < INF)
            lows = tl.minimum(lows, tl.where(finite & mask, low, INF))
            highs = tl.maximum(highs, tl.where(finite & mask, high, -INF))
            nonfinite += (mask & (finite == 0)).to(tl.int32)
        low = tl.min(lows, 0, keep_dims=True)
        high = tl.max(highs, 0, keep_dims=True)
        if CEILING is not None:
            has_values = low <= high
            low = tl.where(has_values, rectify(low, CEILING), low)
            high = tl.where(has_values, rectify(high, CEILING), high)
        element = tl.arange(0, 1)
        update_range(
            low, high, element, element < 1, min_ptr, max_ptr, scale_ptr, zero_point_ptr, averaging_constant, eps,
            QUANT_MIN, QUANT_MAX, SYMMETRIC, FIXED_ZERO_POINT, RULE, COPY_ABOVE,
        )  # fmt: skip
        tl.store(nonfinite_ptr, tl.load(nonfinite_ptr) + tl.sum(nonfinite).to(tl.int64) * weight)
        # What one thread stored, all of them read now.
        tl.debug_barrier()
    active = tl.load(switch_ptr) != 0
    if not KNOWN:
        active = active & (tl.load(min_ptr) <= tl.load(max_ptr))
    tl.store(scale_out, tl.load(scale_ptr))
    if zero_point_ptr is not None:
        tl.store(zero_point_out, tl.load(zero_point_ptr))
    tl.store(active_out, active.to(tl.uint8))


def merge_range(
    low: Tensor, high: Tensor, weight: int, grid: Grid, statistics: RangeStatistics | None, ceiling: float | None
) -> Grid:
    """Merge the ranges of parts of a tensor into a running range, update the grid, and return a snapshot of it.

    The host does not wait. The ranges become one, the ReLU is applied to its ends, the running range takes it in, and
    scale and zero point follow from that. The snapshot is a grid with copies of scale, zero point and switch (off, too,
    while the running range is empty): later updates don't change it.

    Args:
        low: (parts,) float32, smallest value of each part. A part whose ``low`` or ``high`` is NaN or infinite is left
            out. At least one part.
        high: (parts,) float32, largest value of each part.
        weight: number of values in a part; a part that is left out adds it to the count of values that are not finite.
        grid: of the quantizer, one scale per tensor; updated in place.
        statistics: the running range, updated in place. If it is None, frozen or its switch is off, nothing is
            observed, and the grid stays.
        ceiling: upper bound of the ReLU between the values and the quantizer, infinity for a plain one; None: no ReLU.
    """
    device = low.device
    scale = torch.empty(1, dtype=torch.float32, device=device)
    zero_point = None if grid.zero_point is None else torch.empty(1, dtype=torch.int32, device=device)
    enabled = torch.empty(1, dtype=torch.uint8, device=device)
    range_kernel[(1,)](
        low,
        high,
        None if statistics is None else statistics.nonfinite_count,
        observing_switch(statistics),
        switch_of(grid),
        None if statistics is None else statistics.min_val,
        None if statistics is None else statistics.max_val,
        grid.scale,
        grid.zero_point,
        scale,
        zero_point,
        enabled,
        None if statistics is None else statistics.averaging_constant,
        0.0 if statistics is None else statistics.eps,
        len(low),
        weight,
        CEILING=ceiling,
        KNOWN=has_data(statistics),
        **range_constants(grid, statistics),
        BLOCK=min(_RANGE_BLOCK, triton.next_power_of_2(len(low))),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return grid.with_buffers(scale, zero_point, enabled)


@triton.jit
def load_quantizer(scale_ptr, zero_point_ptr, active_ptr):
    """Return ``(scale, zero_point, active)`` of one quantizer as float32 scalars and the value of its switch.

    Without a switch (``active_ptr`` is None) ``active`` is 1, without a zero point ``zero_point`` is 0. Without a
    quantizer (``scale_ptr`` is None) the results are the placeholders 1, 0, 1: Triton's compiler refuses a function
    that returns None among other values.
    """
    scale = 1.0
    zero_point = 0
    active = 1
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        if active_ptr is not None:
            active = tl.load(active_ptr)
        if zero_point_ptr is not None:
            zero_point = tl.load(zero_point_ptr).to(tl.float32)
    return scale, zero_point, active
