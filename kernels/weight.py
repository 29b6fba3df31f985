"""Fold, observe and quantize a weight in one kernel: one read, one write, and the scales never leave the device.

A *row* is all values of one out channel. The *fold* multiplies a row by its BatchNorm's γ/σ. Codes times their *unit*
are the folded, rounded row. *clips*: whether a value may lie outside the codes, where it gets no gradient. A *snapshot*
is a copy of the grid as one call used it. A program holds whole rows if they fit, else it reads its row twice, the
second time from cache. Functions are those of `tritonq.reference.weight`, their specification. `tritonq.kernels`
explains the constants that have no comment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import min_max
from .cached_launch import Launcher
from .channel_tiles import fma
from .launch_sizes import device_guard, warp_size
from .quantized import (
    Grid,
    RangeStatistics,
    grid_constants,
    grid_pointers,
    has_data,
    observing_switch,
    range_constants,
    switch_of,
)
from .rounding import divide_by_scale, is_inside
from .weight_rows import gamma_gradient, nonzero_fold, quantize_rows

# A tile of 8192 float32 takes 8 registers in each of 1024 lanes; longer rows are read in pieces of it.
_MAX_ELEMENTS = 8192
# Short rows share a program, up to this many elements.
_SHARED_ELEMENTS = 1024
_ELEMENTS_PER_LANE = 8
_LANES = (128, 1024)


@Launcher
@triton.jit
def quantize_folded_kernel(
    rows_ptr,  # channels × length, dense
    codes_ptr,  # channels × length, dense, written; float16 codes are scaled, see `Quantized`
    vectors_ptr,  # 4 × channels float32, written: unit of the codes, scale, 1 if rounded (else 0), fold over unit
    fold_ptr,  # (channels,) float32: read, or written where the next is given
    running_var_ptr,  # (channels,), or None: fold_ptr is read
    gamma_ptr,  # (channels,), or None for 1
    inverse_std_ptr,  # (channels,) float32, written with the fold
    bn_eps,  # of the BatchNorm
    switch_ptr,  # one uint8, or (channels,) of any dtype: 0 turns rounding off: codes are rows · fold, the unit is 1
    observing_ptr,  # one uint8; None or 0 leaves range, scale, zero point as they are; None if all rows have one range
    min_ptr,  # (channels,) float32 or one element: running range, updated in place; None: there is none
    max_ptr,  # as min_ptr
    nonfinite_ptr,  # one int64, grows by the number of values that are not finite
    scale_ptr,  # (channels,) float32 or one element, updated in place
    zero_point_ptr,  # as scale, int32; None stands for zero
    zero_point_out,  # (channels,) int32, written: the zero point that was used; not written without zero_point_ptr
    averaging_constant,  # of the running range; None: the extremes of all batches
    eps,  # smallest scale
    channels,
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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether a tile holds whole rows
):
    """Write ``clip(round(rows · fold / scale) + z) - z``, z the zero point; first update the range, if observing."""
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = channel < channels
    if running_var_ptr is None:
        fold = tl.load(fold_ptr + channel, mask=valid, other=1.0)
    else:
        fold, inverse_std = nonzero_fold(running_var_ptr, gamma_ptr, bn_eps, channel, valid)
        tl.store(fold_ptr + channel, fold, mask=valid)
        tl.store(inverse_std_ptr + channel, inverse_std, mask=valid)
    quantize_rows(
        rows_ptr, codes_ptr, vectors_ptr, vectors_ptr + channels, vectors_ptr + 2 * channels,
        vectors_ptr + 3 * channels, zero_point_out, fold[:, None],
        switch_ptr, observing_ptr, min_ptr, max_ptr, nonfinite_ptr, scale_ptr, zero_point_ptr,
        averaging_constant, eps, channel, valid, length, switch_stride, scale_stride,
        KNOWN, QUANT_MIN, QUANT_MAX, SYMMETRIC, FIXED_ZERO_POINT, RULE, COPY_ABOVE,
        CODE_MIN, CODE_MAX, ROUNDING, COLS, WHOLE,
    )  # fmt: skip


@Launcher
@triton.jit
def folded_backward_kernel(
    dcodes_ptr,  # channels × length, dense
    rows_ptr,  # channels × length, dense
    drows_ptr,  # channels × length float32, dense, written
    dfold_ptr,  # (channels,) float32, written: gradient of the fold; with gamma_ptr that of γ in its place
    gamma_ptr,  # (channels,) γ of the BatchNorm; None: the fold's gradient is written, and the next three are None
    inverse_std_ptr,  # (channels,) float32: 1/σ
    eps_share_ptr,  # (channels,) float32: eps / (var + eps), with the batch's variance of the unfolded convolution
    sum_gn_ptr,  # (channels,) float32: Σ g (c - mean) / std; g: gradient behind the BatchNorm, c: its input
    fold_ptr,  # (channels,) float32
    unit_ptr,  # (channels,) float32
    scale_ptr,  # (channels,) float32 or one element; None: nothing was quantized
    zero_point_ptr,  # as scale, int32; None stands for zero
    active_ptr,  # (channels,) or one element, not zero where the row was quantized
    channels,
    length,  # elements of a row
    switch_stride,  # 1 if active_ptr has an element per channel, else 0
    scale_stride,  # 1 if scale_ptr has an element per channel, else 0
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Write the gradients of ROWS rows, ``drows = fold · q``, and of their folds, ``dfold = Σ q · rows``.

    ``q`` is ``dcodes / unit``, and 0 where the code was clipped. With ``gamma_ptr`` γ's gradient is written in place of
    the fold's: ``n + dfold / σ - n · eps_share`` with ``n = sign(fold) · sum_gn``; only n if ``|γ/σ| < 1e-12``.
    """
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = channel < channels
    fold = tl.load(fold_ptr + channel, mask=valid, other=1.0)[:, None]
    unit = tl.load(unit_ptr + channel, mask=valid, other=1.0)[:, None]
    factor = tl.div_rn(fold, unit)
    scale = tl.zeros_like(fold) + 1.0
    zero_point = 0
    active = tl.zeros_like(fold) != 0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel * scale_stride, mask=valid, other=1.0)[:, None]
        active = (tl.load(active_ptr + channel * switch_stride, mask=valid, other=0) != 0)[:, None]
        if zero_point_ptr is not None:
            zero_point = tl.load(zero_point_ptr + channel * scale_stride, mask=valid, other=0).to(tl.float32)[:, None]
    start = channel.to(tl.int64)[:, None] * length
    total = tl.zeros([ROWS, COLS], tl.float32)
    for at in range(0, length, COLS):
        col = at + tl.arange(0, COLS)[None, :]
        mask = valid[:, None] & (col < length)
        value = tl.load(rows_ptr + start + col, mask=mask, other=0.0).to(tl.float32)
        dcode = tl.load(dcodes_ptr + start + col, mask=mask, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            inside = is_inside(divide_by_scale(value * fold, scale, ROUNDING), zero_point, CODE_MIN, CODE_MAX, ROUNDING)
            dcode = tl.where(inside | (active == 0), dcode, 0.0)
        total = fma(dcode, value, total)
        tl.store(drows_ptr + start + col, dcode * factor, mask=mask)
    dfold = tl.div_rn(tl.sum(total, 1, keep_dims=True), unit)
    if gamma_ptr is not None:
        dfold = gamma_gradient(
            dfold, fold, gamma_ptr, inverse_std_ptr, eps_share_ptr, sum_gn_ptr, channel[:, None], valid[:, None]
        )
    tl.store(dfold_ptr + channel[:, None], dfold, mask=valid[:, None])


def quantize_folded(
    rows: Tensor, fold: Tensor, grid: Grid | None, statistics: RangeStatistics | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor, bool, Grid | None]:
    """Return ``(codes, unit, clips, snapshot)`` for ``rows`` (out, ...) and ``fold`` (out,); codes are float32.

    ``codes = clip(round(rows · fold / s) + z) - z``, and ``unit`` is s, (out,). Without a grid, while its switch is off
    or its range is empty, codes are ``rows · fold``, the unit is 1. ``statistics`` are updated first, in place, then
    scale s and zero point z of ``grid``; None: nothing is observed. With a grid ``clips`` is True, and the buffers of
    the snapshot are (out,); without one they are False and None. ``out`` is not used.
    """
    if grid is None:
        return fold_rows(rows, fold), torch.ones_like(fold), False, None
    observed = observe_in_advance(rows, fold, grid, statistics)
    made = quantize(rows, fold, grid, statistics, torch.float32, observes=not observed)
    return made.codes, made.unit, True, made.grid


def folded_codes(
    rows: Tensor,
    fold: Tensor,
    grid: Grid | None,
    out: Tensor | None = None,
    extremes: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, bool, Grid | None]:
    """Return ``(codes, unit, clips, snapshot)`` as :func:`quantize_folded` does, but observe nothing.

    Args:
        rows: the weight, (out, ...).
        fold: (out,) float32, the factor of each row; ``unit`` has its shape and dtype.
        grid: the forward's snapshot. If it is None or switched off, codes are ``rows · fold`` and the unit is 1.
        out: not used; the codes are new memory, float32, shaped as ``rows``.
        extremes: not used; the reference takes the smallest and largest folded value of each row, (out,) each.
    """
    return quantize_folded(rows, fold, grid, None)


def observe_in_advance(rows: Tensor, fold: Tensor, grid: Grid, statistics: RangeStatistics | None) -> bool:
    """Observe ``rows · fold`` if the weight has one scale, in a launch of its own; return whether that was launched.

    Range and grid are updated in place. False: each row has a scale, or ``statistics`` are None or frozen (only read).
    """
    if statistics is None or statistics.frozen or grid.qtype.axis is not None:
        return False
    grid_constants(grid)  # refuses float codes before the range is updated
    min_max.observe(fold_rows(rows, fold), statistics, grid)
    return True


class Quantized(NamedTuple):
    """A folded and quantized weight, of :func:`quantize`: ``codes · unit`` are its values.

    Attributes:
        codes: in the given dtype, laid out as ``dense_rows(rows)``: code minus zero point; folded rows if not rounded.
        unit: (out,) float32: the scale s, or 1 without rounding; s / 2^k for float16 codes, which are 2^k · code.
        ratio: (out,) float32, ``fold / unit``.
        grid: a snapshot: copies of scale, zero point and switch as they were used, (out,) each.
    """

    codes: Tensor
    unit: Tensor
    ratio: Tensor
    grid: Grid


def quantize(
    rows: Tensor,
    fold: Tensor,
    grid: Grid,
    statistics: RangeStatistics | None,
    dtype: torch.dtype,
    *,
    observes: bool = False,
    norm: tuple[Tensor, Tensor | None, float, Tensor] | None = None,
) -> Quantized:
    """Fold, observe and round all rows in one launch; return codes, unit s, ratio ``fold / unit`` and a snapshot.

    Args:
        rows: (out, ...), any float dtype and layout.
        fold: (out,) float32, the factor of each row; written, not read, if ``norm`` is given.
        grid: of the rows, with s and z. While its switch is off or its range empty, codes are ``rows · fold``, units 1.
        statistics: the running range behind the grid; None: nothing is observed, and the range counts as not empty.
        dtype: of the codes ``clip(round(rows · fold / s) + z) - z``. In float16 they are multiplied by the power of
            two nearest to s, and the unit is s over that power.
        observes: whether range, s and z of each row are updated first, in place; False if all rows share one range.
        norm: if the kernel is to compute the fold: running variance, γ (None: 1), eps, and float32 (out,) for ``1/σ``.
    """
    rows = dense_rows(rows)
    channels, length = rows.shape[0], rows[0].numel()
    codes = torch.empty_like(rows, dtype=dtype)
    vectors = torch.empty((4, channels), dtype=torch.float32, device=rows.device)
    zero_point = torch.empty_like(fold, dtype=torch.int32)
    codes_range, switch = grid_constants(grid), switch_of(grid)
    range_tensors: tuple[Tensor | None, ...] = (None, None, None)
    if statistics is not None:
        range_tensors = (statistics.min_val, statistics.max_val, statistics.nonfinite_count)
    running_var, gamma, bn_eps, inverse_std = norm or (None, None, 0.0, None)
    row_block, col_block = _tile(length, _MAX_ELEMENTS)
    with device_guard(rows):
        quantize_folded_kernel[(triton.cdiv(channels, row_block),)](
            rows,
            codes,
            vectors,
            fold,
            running_var,
            gamma,
            inverse_std,
            bn_eps,
            switch,
            observing_switch(statistics) if observes else None,
            *range_tensors,
            grid.scale,
            grid.zero_point,
            zero_point,
            None if statistics is None else statistics.averaging_constant,
            0.0 if statistics is None else statistics.eps,
            channels,
            length,
            int(switch.numel() > 1),
            int(grid.scale.numel() > 1),
            KNOWN=has_data(statistics),
            **range_constants(grid, statistics if observes else None),
            CODE_MIN=codes_range["QUANT_MIN"],
            CODE_MAX=codes_range["QUANT_MAX"],
            ROUNDING=codes_range["ROUNDING"],
            ROWS=row_block,
            COLS=col_block,
            WHOLE=length <= col_block,
            num_warps=_lanes(row_block * col_block) // warp_size(rows.device),
            enable_fp_fusion=False,
        )
    unit, scale, active, ratio = vectors.unbind(0)
    frozen = grid.with_buffers(scale, None if grid.zero_point is None else zero_point, active)
    return Quantized(codes, unit, ratio, frozen)


def folded_backward(
    dcodes: Tensor, rows: Tensor, fold: Tensor, unit: Tensor, grid: Grid | None, clips: bool
) -> tuple[Tensor, Tensor]:
    """Return two gradients from that of the codes, in float32: of the weight, shaped as it, and of the fold, (out,).

    ``q = dcodes / unit``, 0 where the code was clipped; ``drows = fold · q`` and ``dfold = Σ q · rows`` per row.
    ``grid`` is the forward's snapshot, or None. If ``clips`` is False, no value was clipped and no gradient is blocked.
    """
    return gradients(dcodes, rows, fold, unit, grid if clips else None)


def gradients(
    dcodes: Tensor,
    rows: Tensor,
    fold: Tensor,
    unit: Tensor,
    grid: Grid | None,
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients ``fold · q`` of the weight and ``Σ q · rows`` of the fold (with ``norm`` of γ instead).

    ``q = dcodes / unit``, 0 where the code was clipped.

    Args:
        dcodes: gradient of the codes, shaped as ``rows``.
        rows: the weight, (out, ...); its gradient is float32 in this shape.
        fold: (out,).
        unit: (out,), of the codes.
        grid: snapshot of the forward's grid; None where nothing clips.
        norm: γ, ``1/σ``, eps_share and sum_gn as :func:`folded_backward_kernel` takes them, each (out,). With it the
            second result is γ's gradient in place of the fold's.
    """
    rows, unit = dense_rows(rows), unit.contiguous()
    if not same_layout(dcodes, rows):
        dcodes = torch.empty_like(rows, dtype=dcodes.dtype).copy_(dcodes)
    channels, length = rows.shape[0], rows[0].numel()
    drows, dfold = torch.empty_like(rows, dtype=torch.float32), torch.empty_like(fold)
    scale, zero_point, switch = grid_pointers(grid)
    constants = grid_constants(grid)
    row_block, col_block = _tile(length, _MAX_ELEMENTS // 4)
    with device_guard(rows):
        folded_backward_kernel[(triton.cdiv(channels, row_block),)](
            dcodes,
            rows,
            drows,
            dfold,
            *(norm or (None, None, None, None)),
            fold,
            unit,
            scale,
            zero_point,
            switch,
            channels,
            length,
            int(switch is not None and switch.numel() > 1),
            int(scale is not None and scale.numel() > 1),
            CODE_MIN=constants["QUANT_MIN"],
            CODE_MAX=constants["QUANT_MAX"],
            ROUNDING=constants["ROUNDING"],
            ROWS=row_block,
            COLS=col_block,
            num_warps=_lanes(row_block * col_block) // warp_size(rows.device),
            enable_fp_fusion=False,
        )
    return drows, dfold


def dense_rows(rows: Tensor) -> Tensor:
    """Return ``rows`` if it is contiguous, channels_last or channels_last_3d, else a contiguous copy.

    In all of them the out channels lie one behind the other without gaps.
    """
    if rows.is_contiguous():
        return rows
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(rows.dim())
    return rows if last is not None and rows.is_contiguous(memory_format=last) else rows.contiguous()


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, which must have the same shape, have equal strides along all axes longer than 1.

    One offset then addresses the same element of both.
    """
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or step == other_step for size, step, other_step in strides)


def _tile(length: int, most: int) -> tuple[int, int]:
    """Return rows and columns of a program's tile, for rows of ``length`` elements; ``most`` is the most columns."""
    cols = min(triton.next_power_of_2(max(1, length)), most)
    return max(1, _SHARED_ELEMENTS // cols), cols


def _lanes(elements: int) -> int:
    return max(_LANES[0], min(_LANES[1], elements // _ELEMENTS_PER_LANE))


def fold_rows(rows: Tensor, fold: Tensor) -> Tensor:
    """Return ``rows · fold`` in float32, shaped as ``rows`` (out, ...); ``fold`` is (out,)."""
    return rows.float() * fold.view(-1, *[1] * (rows.dim() - 1))
