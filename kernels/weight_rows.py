"""Device functions on the rows of a weight: the factor of its BatchNorm, its codes, and the gradient of γ.

A *row* is all values of one out channel; its *fold* is γ/σ, by which the row is multiplied. `tritonq.kernels` explains
the constants that have no comment.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INF
from .min_max import update_range
from .rounding import divide_by_scale, nearest_power, round_to_steps

# Below this a fold counts as zero; see `tritonq.reference.fold`.
_TINY_FOLD = tl.constexpr(1e-12)


@triton.jit
def nonzero_fold(running_var_ptr, gamma_ptr, eps, channel, valid):
    """Return two float32 blocks: the fold ``γ/σ`` of some channels (``1/σ`` if ``|γ/σ| < 1e-12``), and ``1/σ``.

    ``σ = sqrt(running_var + eps)``. The fold is never zero, since a training step divides by it.

    Args:
        running_var_ptr: (channels,).
        gamma_ptr: (channels,), or None for 1.
        eps: of the BatchNorm.
        channel: block of channel numbers; the results have its shape.
        valid: which of them exist; results for others mean nothing.
    """
    variance = tl.load(running_var_ptr + channel, mask=valid, other=1.0).to(tl.float32)
    inverse_std = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    fold = inverse_std
    if gamma_ptr is not None:
        fold = tl.load(gamma_ptr + channel, mask=valid, other=1.0).to(tl.float32) * inverse_std
        fold = tl.where(tl.abs(fold) < _TINY_FOLD, inverse_std, fold)
    return fold, inverse_std


@triton.jit
def gamma_gradient(
    dfold,  # (ROWS, 1) float32, gradient of the fold
    fold,  # (ROWS, 1) float32
    gamma_ptr,  # (channels,)
    inverse_std_ptr,  # (channels,) float32: 1/σ
    eps_share_ptr,  # (channels,) float32: eps / (var + eps), with the batch's variance of the unfolded convolution
    sum_gn_ptr,  # (channels,) float32: Σ g (c - mean) / std; g: gradient behind the BatchNorm, c: its input
    channel,  # (ROWS, 1) channel numbers
    valid,  # (ROWS, 1) which of them exist
):
    """Return the gradient of γ from that of the fold, (ROWS, 1): ``n + dfold · inverse_std - n · eps_share``.

    ``n = sign(fold) · sum_gn``. Where ``|γ · inverse_std| < 1e-12`` the fold was ``1/σ``, and the gradient is ``n``.
    """
    inverse_std = tl.load(inverse_std_ptr + channel, mask=valid, other=0.0)
    direct = tl.load(sum_gn_ptr + channel, mask=valid, other=0.0)
    direct = tl.where(fold < 0, -direct, direct)
    through_fold = dfold * inverse_std - direct * tl.load(eps_share_ptr + channel, mask=valid, other=0.0)
    gamma = tl.load(gamma_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    return tl.where(tl.abs(gamma * inverse_std) < _TINY_FOLD, direct, direct + through_fold)


@triton.jit
def quantize_rows(
    rows_ptr,  # channels × length, dense
    codes_ptr,  # channels × length, dense, written
    unit_out,  # (channels,) float32, written: values are codes · unit
    scale_out,  # (channels,) float32, written: the scale that was used
    active_out,  # (channels,) written: 1 if the row was rounded, else 0
    ratio_out,  # (channels,) float32, written: fold over unit; None: not written
    zero_point_out,  # (channels,) int32, written: the zero point that was used; not written without zero_point_ptr
    fold,  # (ROWS, 1) float32
    switch_ptr,  # one element, or one per channel: 0 leaves the folded row in float
    observing_ptr,  # one uint8; None or 0 leaves ranges, scales and zero points as they are
    min_ptr,  # (channels,) float32 or one element: running range, updated in place; None: there is none
    max_ptr,  # as min_ptr
    nonfinite_ptr,  # one int64, grows by the number of values that are not finite
    scale_ptr,  # (channels,) float32 or one element, updated in place
    zero_point_ptr,  # as scale, int32; None stands for zero
    averaging_constant,  # of the running range; None: the extremes of all batches
    eps,  # smallest scale
    channel,  # (ROWS,) numbers of rows of this weight
    valid,  # (ROWS,) which of them exist
    length,  # elements of a row
    switch_stride,  # 1 if switch_ptr has an element per channel, else 0
    scale_stride,  # 1 if scale and range have an element per channel, else 0
    KNOWN: tl.constexpr,  # whether the host knows that the range holds data
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED_ZERO_POINT: tl.constexpr,
    RULE: tl.constexpr,
    COPY_ABOVE: tl.constexpr,
    CODE_MIN: tl.constexpr,  # smallest code, as QUANT_MIN, which is a placeholder where nothing is observed
    CODE_MAX: tl.constexpr,  # largest code
    ROUNDING: tl.constexpr,
    COLS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether a tile holds whole rows
):
    """Fold, observe and quantize some rows of a weight.

    ``codes = clip(round(rows · fold / scale) + zero_point) - zero_point``, and ``unit = scale``; what ends in ``_out``
    is written per row. If the switch at ``observing_ptr`` is not 0, the range, scale and zero point of each row are
    updated first, from its finite values. If range and scale have one element for all rows, the caller observes
    beforehand and passes None for ``observing_ptr``. Codes in float16 are multiplied by the power of two nearest to the
    unit, and the unit is divided by that power. While rounding is switched off, or the range is empty, codes are
    ``rows · fold`` and the unit is 1.
    """
    start = channel.to(tl.int64)[:, None] * length
    col = tl.arange(0, COLS)[None, :]
    mask = valid[:, None] & (col < length)
    folded = tl.load(rows_ptr + start + col, mask=mask, other=0.0).to(tl.float32) * fold
    if observing_ptr is not None and tl.load(observing_ptr) != 0:
        finite = tl.abs(folded) < INF
        low = tl.where(mask & finite, folded, INF)
        high = tl.where(mask & finite, folded, -INF)
        nonfinite = (mask & (finite == 0)).to(tl.int32)
        if not WHOLE:
            for at in range(COLS, length, COLS):
                later_mask = valid[:, None] & (at + col < length)
                value = tl.load(rows_ptr + start + at + col, mask=later_mask, other=0.0).to(tl.float32) * fold
                finite = tl.abs(value) < INF
                low = tl.minimum(low, tl.where(later_mask & finite, value, INF))
                high = tl.maximum(high, tl.where(later_mask & finite, value, -INF))
                nonfinite += (later_mask & (finite == 0)).to(tl.int32)
        update_range(
            tl.min(low, 1), tl.max(high, 1), channel, valid, min_ptr, max_ptr, scale_ptr, zero_point_ptr,
            averaging_constant, eps, QUANT_MIN, QUANT_MAX, SYMMETRIC, FIXED_ZERO_POINT, RULE, COPY_ABOVE,
        )  # fmt: skip
        skipped = tl.sum(tl.sum(nonfinite, 1), 0)
        if skipped > 0:
            tl.atomic_add(nonfinite_ptr, skipped.to(tl.int64))
        # What one thread stored, all of them read now.
        tl.debug_barrier()
    active = tl.load(switch_ptr + channel * switch_stride, mask=valid, other=0) != 0
    if not KNOWN:
        low_seen = tl.load(min_ptr + channel * scale_stride, mask=valid, other=INF)
        active = active & (low_seen <= tl.load(max_ptr + channel * scale_stride, mask=valid, other=-INF))
    scale = tl.load(scale_ptr + channel * scale_stride, mask=valid, other=1.0)
    zero_point = 0
    if zero_point_ptr is not None:
        zeros = tl.load(zero_point_ptr + channel * scale_stride, mask=valid, other=0)
        tl.store(zero_point_out + channel, zeros, mask=valid)
        zero_point = zeros.to(tl.float32)[:, None]
    unit = tl.where(active, scale, 1.0)
    power = tl.full([1, 1], 1.0, tl.float32)
    if codes_ptr.dtype.element_ty == tl.float16:
        # A sum of 8-bit codes overflows in float16.
        nearest = nearest_power(unit)
        unit = tl.div_rn(unit, nearest)
        power = nearest[:, None]
    tl.store(unit_out + channel, unit, mask=valid)
    if ratio_out is not None:
        tl.store(ratio_out + channel[:, None], tl.div_rn(fold, unit[:, None]), mask=valid[:, None])
    tl.store(scale_out + channel, scale, mask=valid)
    tl.store(active_out + channel, tl.where(active, 1.0, 0.0), mask=valid)

    steps = round_to_steps(divide_by_scale(folded, scale[:, None], ROUNDING), zero_point, CODE_MIN, CODE_MAX, ROUNDING)
    tl.store(codes_ptr + start + col, tl.where(active[:, None], steps, folded) * power, mask=mask)
    if not WHOLE:
        for at in range(COLS, length, COLS):
            later_mask = valid[:, None] & (at + col < length)
            folded = tl.load(rows_ptr + start + at + col, mask=later_mask, other=0.0).to(tl.float32) * fold
            steps = round_to_steps(
                divide_by_scale(folded, scale[:, None], ROUNDING), zero_point, CODE_MIN, CODE_MAX, ROUNDING
            )
            tl.store(codes_ptr + start + at + col, tl.where(active[:, None], steps, folded) * power, mask=later_mask)
