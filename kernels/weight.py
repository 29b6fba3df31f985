"""Fold, observe and quantize a weight in one kernel: one read, one write, and the qparams never leave the device.

A program holds whole rows (out channels) where they fit, else it reads its row twice, the second time from cache.
Functions here have the names, signatures and results of `tritonq.reference.weight`, their specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import min_max
from .channel_tiles import fma
from .constants import INF
from .launch import device_guard, warp_size
from .launcher import Launcher
from .min_max import update_range
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
from .rounding import divide_by_scale, is_inside, round_to_steps

# A tile of 8192 float32 takes 8 registers in each of 1024 lanes; longer rows are read in pieces of it.
_MAX_ELEMENTS = 8192
# Short rows share a program, up to this many elements.
_SHARED_ELEMENTS = 1024
_ELEMENTS_PER_LANE = 8
_LANES = (128, 1024)


@triton.jit
def quantize_rows(
    rows_ptr,
    codes_ptr,
    unit_out,
    scale_out,
    active_out,
    zero_point_out,
    fold,  # (ROWS, 1) float32
    switch_ptr,
    observing_ptr,
    min_ptr,
    max_ptr,
    nonfinite_ptr,
    scale_ptr,
    zero_point_ptr,
    averaging_constant,
    eps,
    channel,  # (ROWS,) rows of this weight
    valid,  # (ROWS,) which of them exist
    length,
    switch_stride,
    scale_stride,
    KNOWN: tl.constexpr,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED_ZERO_POINT: tl.constexpr,
    RULE: tl.constexpr,
    COPY_ABOVE: tl.constexpr,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    COLS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Fold, observe and quantize some rows of a weight; arguments as those of the kernels that call it."""
    start = channel.to(tl.int64)[:, None] * length
    col = tl.arange(0, COLS)[None, :]
    mask = valid[:, None] & (col < length)
    folded = tl.load(rows_ptr + start + col, mask=mask, other=0.0).to(tl.float32) * fold
    if observing_ptr is not None and tl.load(observing_ptr) != 0:
        finite = tl.abs(folded) < INF
        low = tl.where(mask & finite, folded, INF)
        high = tl.where(mask & finite, folded, -INF)
        bad = (mask & (finite == 0)).to(tl.int32)
        if not WHOLE:
            for at in range(COLS, length, COLS):
                more = valid[:, None] & (at + col < length)
                value = tl.load(rows_ptr + start + at + col, mask=more, other=0.0).to(tl.float32) * fold
                finite = tl.abs(value) < INF
                low = tl.minimum(low, tl.where(more & finite, value, INF))
                high = tl.maximum(high, tl.where(more & finite, value, -INF))
                bad += (more & (finite == 0)).to(tl.int32)
        update_range(
            tl.min(low, 1), tl.max(high, 1), channel, valid, min_ptr, max_ptr, scale_ptr, zero_point_ptr,
            averaging_constant, eps, QUANT_MIN, QUANT_MAX, SYMMETRIC, FIXED_ZERO_POINT, RULE, COPY_ABOVE,
        )  # fmt: skip
        skipped = tl.sum(tl.sum(bad, 1), 0)
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
    tl.store(unit_out + channel, tl.where(active, scale, 1.0), mask=valid)
    tl.store(scale_out + channel, scale, mask=valid)
    tl.store(active_out + channel, tl.where(active, 1.0, 0.0), mask=valid)

    steps = round_to_steps(divide_by_scale(folded, scale[:, None], ROUNDING), zero_point, CODE_MIN, CODE_MAX, ROUNDING)
    tl.store(codes_ptr + start + col, tl.where(active[:, None], steps, folded), mask=mask)
    if not WHOLE:
        for at in range(COLS, length, COLS):
            more = valid[:, None] & (at + col < length)
            folded = tl.load(rows_ptr + start + at + col, mask=more, other=0.0).to(tl.float32) * fold
            steps = round_to_steps(
                divide_by_scale(folded, scale[:, None], ROUNDING), zero_point, CODE_MIN, CODE_MAX, ROUNDING
            )
            tl.store(codes_ptr + start + at + col, tl.where(active[:, None], steps, folded), mask=more)


@Launcher
@triton.jit
def quantize_folded_kernel(
    rows_ptr,  # channels × length, dense
    codes_ptr,  # channels × length float32, dense
    vectors_ptr,  # 3 × channels float32: unit (the scale, or 1 where quantization is off), scale, whether it is on
    fold_ptr,  # (channels,) float32
    switch_ptr,  # one uint8, or (channels,) of any dtype: whether fake quantization is on
    observing_ptr,  # one uint8; None or 0 leaves the ranges as they are
    min_ptr,  # (channels,) float32 or one element, updated in place; None where the qparams are known to be good
    max_ptr,
    nonfinite_ptr,  # one int64
    scale_ptr,  # (channels,) float32 or one element, updated in place
    zero_point_ptr,  # as scale, int32; None stands for zero
    zero_point_out,  # (channels,) int32: a copy
    averaging_constant,
    eps,
    channels,
    length,
    switch_stride,  # 0 or 1, as the next
    scale_stride,
    KNOWN: tl.constexpr,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED_ZERO_POINT: tl.constexpr,
    RULE: tl.constexpr,
    COPY_ABOVE: tl.constexpr,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Rows to codes; with ``observing_ptr`` their ranges and scales first. Has run on no GPU yet."""
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = channel < channels
    fold = tl.load(fold_ptr + channel, mask=valid, other=1.0)[:, None]
    quantize_rows(
        rows_ptr, codes_ptr, vectors_ptr, vectors_ptr + channels, vectors_ptr + 2 * channels, zero_point_out, fold,
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
    drows_ptr,  # channels × length float32, dense
    dfold_ptr,  # (channels,) float32
    fold_ptr,  # (channels,) float32
    unit_ptr,  # (channels,) float32
    scale_ptr,  # (channels,) float32 or one element; None: nothing was quantized
    zero_point_ptr,  # as scale, int32; None stands for zero
    active_ptr,  # (channels,) or one element, not zero where the row was quantized
    channels,
    length,
    switch_stride,  # 0 or 1, as the next
    scale_stride,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Gradients of the rows and of the fold; the mask is computed again from the rows. Has run on no GPU yet."""
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
        q = tl.load(dcodes_ptr + start + col, mask=mask, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            inside = is_inside(divide_by_scale(value * fold, scale, ROUNDING), zero_point, CODE_MIN, CODE_MAX, ROUNDING)
            q = tl.where(inside | (active == 0), q, 0.0)
        total = fma(q, value, total)
        tl.store(drows_ptr + start + col, q * factor, mask=mask)
    dfold = tl.div_rn(tl.sum(total, 1, keep_dims=True), unit)
    tl.store(dfold_ptr + channel[:, None], dfold, mask=valid[:, None])


def quantize_folded(
    rows: Tensor, fold: Tensor, grid: Grid | None, statistics: RangeStatistics | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor, bool, Grid | None]:
    """Fold, observe and quantize: codes, unit, True (something may clip), and a snapshot of the grid.

    ``out`` is not used: a GPU's allocator hands out again what was freed.
    """
    observes = statistics is not None and not statistics.frozen
    if grid is not None and statistics is not None and observes and grid.qtype.axis is None:
        # One scale for all rows: every row is read before the first is quantized.
        min_max.observe(rows.float() * _column(fold, rows), statistics, grid)
        return _quantize(rows, fold, grid, statistics, observes=False)
    return _quantize(rows, fold, grid, statistics, observes=observes)


def folded_codes(
    rows: Tensor,
    fold: Tensor,
    grid: Grid | None,
    out: Tensor | None = None,
    extremes: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, bool, Grid | None]:
    """Return the codes of :func:`quantize_folded` once more, from its snapshot; ``out`` and ``extremes`` are unused."""
    return _quantize(rows, fold, grid, None, observes=False)


def _quantize(
    rows: Tensor, fold: Tensor, grid: Grid | None, statistics: RangeStatistics | None, observes: bool
) -> tuple[Tensor, Tensor, bool, Grid | None]:
    if grid is None:
        return rows.float() * _column(fold, rows), torch.ones_like(fold), False, None
    rows = rows.contiguous()
    channels, length = rows.shape[0], rows[0].numel()
    codes = torch.empty_like(rows, dtype=torch.float32)
    vectors = torch.empty((3, channels), dtype=torch.float32, device=rows.device)
    zero_point = torch.empty_like(fold, dtype=torch.int32)
    qtype, switch = grid.qtype, switch_of(grid)
    range_tensors: tuple[Tensor | None, ...] = (None, None, None)
    if statistics is not None:
        range_tensors = (statistics.min_val, statistics.max_val, statistics.nonfinite_count)
    row_block, col_block = _tile(length)
    with device_guard(rows):
        quantize_folded_kernel[(triton.cdiv(channels, row_block),)](
            rows,
            codes,
            vectors,
            fold,
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
            CODE_MIN=qtype.quant_min,
            CODE_MAX=qtype.quant_max,
            ROUNDING=qtype.rounding,
            ROWS=row_block,
            COLS=col_block,
            WHOLE=length <= col_block,
            num_warps=_lanes(row_block * col_block) // warp_size(rows.device),
            enable_fp_fusion=False,
        )
    unit, scale, active = vectors.unbind(0)
    return codes, unit, True, grid.with_buffers(scale, None if grid.zero_point is None else zero_point, active)


def folded_backward(
    dcodes: Tensor,
    rows: Tensor,
    fold: Tensor,
    unit: Tensor,
    grid: Grid | None,
    clips: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and of the fold from that of the codes, in float32."""
    rows, dcodes, unit = rows.contiguous(), dcodes.contiguous(), unit.contiguous()
    channels, length = rows.shape[0], rows[0].numel()
    drows, dfold = torch.empty_like(rows, dtype=torch.float32), torch.empty_like(fold)
    masked = grid if clips else None
    scale, zero_point, switch = grid_pointers(masked)
    constants = grid_constants(masked)
    row_block, col_block = _tile(length, _MAX_ELEMENTS // 4)
    with device_guard(rows):
        folded_backward_kernel[(triton.cdiv(channels, row_block),)](
            dcodes,
            rows,
            drows,
            dfold,
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


def _tile(length: int, most: int = _MAX_ELEMENTS) -> tuple[int, int]:
    """Rows and columns of a program's tile: whole rows where they fit."""
    cols = min(triton.next_power_of_2(max(1, length)), most)
    return max(1, _SHARED_ELEMENTS // cols), cols


def _lanes(elements: int) -> int:
    least, most = _LANES
    return max(least, min(most, elements // _ELEMENTS_PER_LANE))


def _column(vector: Tensor, rows: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (rows.dim() - 1))
