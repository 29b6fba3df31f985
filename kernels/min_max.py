"""Running ranges: one read of the batch; the range, its scale and its zero point never leave the device.

Two stages in a fixed order and no floating-point atomics: the same input gives the same bits. Where one program sees
the whole of a channel it finishes by itself, in the same launch. Functions here have the names, signatures and results
of `tritonq.reference.min_max`, their specification.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard, multiprocessors, parameters, planned, warp_size
from .launcher import Launcher
from .layout import LaunchGrid, Split, Tile, View, dense_view, launch_grid, split, tile_shape, view
from .qparams import range_to_qparams
from .quantized import NO_RANGE, Grid, RangeStatistics, range_constants
from .tile import program_along

_INF = tl.constexpr(float("inf"))

# Eight elements per lane: the compiler unrolls the loop itself, with loads in flight and 52 registers at most. Larger
# tiles made it spill (perf/codegen.py).
_MAX_ELEMENTS = 1024
# A program that reads less than this costs more than its partial result saves. By loads in flight, not measured.
_MIN_ELEMENTS_PER_PROGRAM = 8192
_PROGRAMS_PER_MULTIPROCESSOR = 4
# Partial results that one program of the second stage holds at a time.
_FINISH_ELEMENTS = 1024


@triton.jit
def scan_min_max(
    x_ptr,  # outer × rows × cols, by strides
    first,  # in x's dtype, broadcasts against a tile: an element of each channel, stands in for missing elements
    x_outer,
    x_row,
    x_col,
    outer_from,
    outer_to,
    row_from,
    row_to,
    col_from,
    col_to,
    rows,
    cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FINITE_ONLY: tl.constexpr,
):
    """Elementwise minimum and maximum over the tiles of a share, (ROWS, COLS) each, and how many values were skipped.

    Without FINITE_ONLY nothing is skipped and NaN propagates: two instructions per element.
    """
    low = tl.full([ROWS, COLS], _INF, tl.float32)
    high = tl.full([ROWS, COLS], -_INF, tl.float32)
    skipped = tl.zeros([], tl.int64)
    for outer in range(outer_from, outer_to):
        for row_start in range(row_from, row_to, ROWS):
            for col_start in range(col_from, col_to, COLS):
                row = row_start + tl.arange(0, ROWS)[:, None]
                col = col_start + tl.arange(0, COLS)[None, :]
                mask = (row < rows) & (col < cols)
                x = tl.load(x_ptr + (outer * x_outer + row * x_row + col * x_col), mask=mask, other=first)
                x = x.to(tl.float32)
                if FINITE_ONLY:
                    finite = tl.abs(x) < _INF
                    low = tl.minimum(low, tl.where(finite, x, _INF))
                    high = tl.maximum(high, tl.where(finite, x, -_INF))
                    skipped += tl.sum((mask & (finite == 0)).to(tl.int32))
                else:
                    low = tl.minimum(low, x, propagate_nan=tl.PropagateNan.ALL)
                    high = tl.maximum(high, x, propagate_nan=tl.PropagateNan.ALL)
    return low, high, skipped


@triton.jit
def update_range(
    low,  # (n,) float32, a batch's minima; +inf where it had no finite value
    high,  # (n,)
    channel,  # (n,) channel numbers
    valid,  # (n,) which of them exist
    min_ptr,  # (channels,) float32, updated in place
    max_ptr,  # (channels,) float32, updated in place
    scale_ptr,  # (channels,) float32, or None
    zero_point_ptr,  # (channels,) int32, or None
    averaging_constant,  # float, or None for a running minimum and maximum
    eps,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED_ZERO_POINT: tl.constexpr,
    RULE: tl.constexpr,
    COPY_ABOVE: tl.constexpr,
):
    """Merge a batch's range into the running one and write the qparams that follow."""
    min_val = tl.load(min_ptr + channel, mask=valid, other=_INF)
    max_val = tl.load(max_ptr + channel, mask=valid, other=-_INF)
    if averaging_constant is None:
        min_val = tl.minimum(min_val, low)
        max_val = tl.maximum(max_val, high)
    else:
        seen = min_val <= max_val
        if COPY_ABOVE is not None:
            # In float64, where the product is rounded as Python rounds it.
            magnitude = tl.maximum(-min_val, max_val).to(tl.float64)
            seen = seen & (tl.maximum(-low, high).to(tl.float64) <= COPY_ABOVE * magnitude)
        usable = low <= high
        new_min = tl.where(seen, min_val + averaging_constant * (low - min_val), low)
        new_max = tl.where(seen, max_val + averaging_constant * (high - max_val), high)
        min_val = tl.where(usable, new_min, min_val)
        max_val = tl.where(usable, new_max, max_val)
    tl.store(min_ptr + channel, min_val, mask=valid)
    tl.store(max_ptr + channel, max_val, mask=valid)
    if scale_ptr is not None:
        scale, zero_point = range_to_qparams(
            min_val, max_val, eps, QUANT_MIN, QUANT_MAX, SYMMETRIC, FIXED_ZERO_POINT, RULE
        )
        tl.store(scale_ptr + channel, scale, mask=valid)
        tl.store(zero_point_ptr + channel, zero_point, mask=valid)


@Launcher
@triton.jit
def observe_kernel(
    x_ptr,  # outer × rows × cols, by strides
    partial_ptr,  # 2 × splits × channels float32: minima, maxima; None with SINGLE
    enabled_ptr,  # one uint8, 0 ends the kernel; None counts as 1
    nonfinite_ptr,  # one int64, grows by the number of values skipped
    min_ptr,  # state as in update_range, used with SINGLE
    max_ptr,
    scale_ptr,
    zero_point_ptr,
    averaging_constant,
    eps,
    x_outer,
    x_row,
    x_col,
    outers,
    rows,
    cols,
    outer_share,  # what one program takes of each dimension; whole tiles
    row_share,
    col_share,
    split_outer,  # strides of the partial results' first axis over program numbers
    split_row,
    split_col,
    splits,
    channels,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED_ZERO_POINT: tl.constexpr,
    RULE: tl.constexpr,
    COPY_ABOVE: tl.constexpr,
    CHANNEL: tl.constexpr,
    SINGLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Reduce one share of one tile of channels; with SINGLE also update the range. Has run on no GPU yet."""
    if enabled_ptr is not None and tl.load(enabled_ptr) == 0:
        return
    outer_program = program_along(0, FIRST)
    row_program = program_along(1, FIRST)
    col_program = program_along(2, FIRST)
    if WIDE:
        outer_program = outer_program.to(tl.int64)
        row_program = row_program.to(tl.int64)
        col_program = col_program.to(tl.int64)
    outer_from = outer_program * outer_share
    row_from = row_program * row_share
    col_from = col_program * col_share
    outer_to = tl.minimum(outer_from + outer_share, outers)
    row_to = tl.minimum(row_from + row_share, rows)
    col_to = tl.minimum(col_from + col_share, cols)

    # A share is empty only where the tensor is; nothing may be read then.
    exists = (outer_from < outer_to) & (row_from < row_to) & (col_from < col_to)
    start = x_ptr + (outer_from * x_outer + row_from * x_row + col_from * x_col)
    if CHANNEL == 1:
        row = tl.arange(0, ROWS)
        first = tl.load(start + (row * x_row)[:, None], mask=(row_from + row < rows)[:, None] & exists, other=0)
    elif CHANNEL == 2:
        col = tl.arange(0, COLS)
        first = tl.load(start + (col * x_col)[None, :], mask=(col_from + col < cols)[None, :] & exists, other=0)
    else:
        first = tl.load(start, mask=exists, other=0)

    low, high, _ = scan_min_max(
        x_ptr, first, x_outer, x_row, x_col, outer_from, outer_to, row_from, row_to, col_from, col_to, rows, cols,
        ROWS, COLS, False,
    )  # fmt: skip
    unclean = ((tl.abs(low) < _INF) & (tl.abs(high) < _INF)) == 0
    if tl.max(unclean.to(tl.int32)) > 0:
        # Rare: a value is NaN or infinite. Read the share again and leave those out.
        low, high, skipped = scan_min_max(
            x_ptr, first, x_outer, x_row, x_col, outer_from, outer_to, row_from, row_to, col_from, col_to, rows, cols,
            ROWS, COLS, True,
        )  # fmt: skip
        # An integer sum is the same in any order.
        tl.atomic_add(nonfinite_ptr, skipped)
    if CHANNEL == 1:
        low, high = tl.min(low, 1), tl.max(high, 1)
        channel = row_from + tl.arange(0, ROWS)
    elif CHANNEL == 2:
        low, high = tl.min(low, 0), tl.max(high, 0)
        channel = col_from + tl.arange(0, COLS)
    else:
        low = tl.min(tl.min(low, 1), 0, keep_dims=True)
        high = tl.max(tl.max(high, 1), 0, keep_dims=True)
        channel = (outer_program if CHANNEL == 0 else 0) + tl.arange(0, 1)
    valid = channel < channels

    if SINGLE:
        update_range(
            low, high, channel, valid, min_ptr, max_ptr, scale_ptr, zero_point_ptr, averaging_constant, eps,
            QUANT_MIN, QUANT_MAX, SYMMETRIC, FIXED_ZERO_POINT, RULE, COPY_ABOVE,
        )  # fmt: skip
    else:
        split_number = (
            program_along(0, FIRST) * split_outer
            + program_along(1, FIRST) * split_row
            + program_along(2, FIRST) * split_col
        )
        at = split_number * channels + channel
        tl.store(partial_ptr + at, low, mask=valid)
        tl.store(partial_ptr + splits * channels + at, high, mask=valid)


@Launcher
@triton.jit
def finish_kernel(
    partial_ptr,  # 2 × splits × channels float32: minima, maxima
    enabled_ptr,  # one uint8, 0 ends the kernel; None counts as 1
    min_ptr,  # state as in update_range
    max_ptr,
    scale_ptr,
    zero_point_ptr,
    averaging_constant,
    eps,
    splits,
    channels,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED_ZERO_POINT: tl.constexpr,
    RULE: tl.constexpr,
    COPY_ABOVE: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Reduce the partial results of CHANNELS channels and update their range. Has run on no GPU yet."""
    if enabled_ptr is not None and tl.load(enabled_ptr) == 0:
        return
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    low = tl.full([SPLITS, CHANNELS], _INF, tl.float32)
    high = tl.full([SPLITS, CHANNELS], -_INF, tl.float32)
    for start in range(0, splits, SPLITS):
        part = start + tl.arange(0, SPLITS)[:, None]
        at = part * channels + channel[None, :]
        mask = (part < splits) & valid[None, :]
        low = tl.minimum(low, tl.load(partial_ptr + at, mask=mask, other=_INF))
        high = tl.maximum(high, tl.load(partial_ptr + splits * channels + at, mask=mask, other=-_INF))
    update_range(
        tl.min(low, 0), tl.max(high, 0), channel, valid, min_ptr, max_ptr, scale_ptr, zero_point_ptr,
        averaging_constant, eps, QUANT_MIN, QUANT_MAX, SYMMETRIC, FIXED_ZERO_POINT, RULE, COPY_ABOVE,
    )  # fmt: skip


def min_max(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest finite value of ``x``, or of each channel, and how many values are not finite."""
    shape = () if axis is None else (x.shape[axis],)
    low = torch.full(shape, torch.inf, dtype=torch.float32, device=x.device)
    high = torch.full(shape, -torch.inf, dtype=torch.float32, device=x.device)
    nonfinite = torch.zeros((), dtype=torch.int64, device=x.device)
    _observe(x, axis, (low, high, None, None, None, 0.0), nonfinite, None, NO_RANGE)
    return low, high, nonfinite


def observe(x: Tensor, statistics: RangeStatistics, grid: Grid | None = None) -> None:
    """Update a running range with ``x``, and the grid that follows from it, in place on the device."""
    if statistics.frozen:
        return
    scale, zero_point, constants = None, None, NO_RANGE
    if grid is not None:
        constants = range_constants(grid, statistics)
        scale, zero_point = grid.scale, grid.zero_point
        if zero_point is None:
            zero_point = torch.empty_like(scale, dtype=torch.int32)
    constants = {**constants, "COPY_ABOVE": statistics.copy_above, "RULE": statistics.rule}
    ends = (statistics.min_val, statistics.max_val)
    state = (*ends, scale, zero_point, statistics.averaging_constant, statistics.eps)
    _observe(x, statistics.granularity.axis, state, statistics.nonfinite_count, statistics.enabled, constants)


def _observe(
    x: Tensor,
    axis: int | None,
    state: tuple[Any, ...],
    nonfinite_count: Tensor,
    enabled: Tensor | None,
    constants: dict[str, Any],
) -> None:
    """Launch one kernel, or two where a channel is shared between programs."""
    x, seen = viewed(x, axis)
    if seen.channels == 0:
        return
    tile, parts, launch, split_strides, splits = plan_reduction(x.dtype, seen, x.device, warp_size(x.device))
    partial = None
    if splits > 1:
        partial = torch.empty((2, splits, seen.channels), dtype=torch.float32, device=x.device)
    with device_guard(x):
        observe_kernel[launch.programs](
            x,
            partial,
            enabled,
            nonfinite_count,
            *state,
            *seen.strides[0],
            *seen.sizes,
            *parts.share,
            *split_strides,
            splits,
            seen.channels,
            **constants,
            SINGLE=splits == 1,
            **seen.constants(tile, launch),
        )
        if splits > 1:
            channels = min(triton.next_power_of_2(seen.channels), 32)
            finish_kernel[(triton.cdiv(seen.channels, channels),)](
                partial,
                enabled,
                *state,
                splits,
                seen.channels,
                **constants,
                SPLITS=min(triton.next_power_of_2(splits), _FINISH_ELEMENTS // channels),
                CHANNELS=channels,
                num_warps=4,
                enable_fp_fusion=False,
            )


def viewed(x: Tensor, axis: int | None) -> tuple[Tensor, View]:
    """``x`` and its view; those of a contiguous copy where the strides of ``x`` allow none."""
    seen = view(x.shape, (x.stride(),), axis)
    if seen is not None:
        return x, seen
    x = x.contiguous()
    return x, dense_view(x.shape, (x.stride(),), axis)


@planned("min_max")
def plan_reduction(
    dtype: torch.dtype, seen: View, device: torch.device, warp_size: int
) -> tuple[Tile, Split, LaunchGrid, tuple[int, int, int], int]:
    """Tile, shares, grid, strides of the partial results over program numbers, and their number per channel."""
    chosen = parameters("min_max", dtype, seen, device)
    rows, cols = tile_shape(seen.sizes, min(chosen.elements, _MAX_ELEMENTS), chosen.max_cols)
    programs = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device)
    parts = split(seen.sizes, seen.channel, (1, rows, cols), programs, _MIN_ELEMENTS_PER_PROGRAM)
    strides, splits = [0, 0, 0], 1
    for d in (2, 1, 0):
        if d != seen.channel:
            strides[d] = splits
            splits *= parts.programs[d]
    tile = Tile(rows, cols, chosen.num_warps(warp_size))
    return tile, parts, launch_grid(parts.programs), (strides[0], strides[1], strides[2]), splits
