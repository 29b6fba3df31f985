"""Histograms: one read of the batch gives counts, exact extremes and the number of values that are not finite.

Counts are integers, so their order does not matter: programs add theirs with integer atomics. Functions here have the
names, signatures and results of `tritonq.reference.histogram`, their specification.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard, warp_size
from .launcher import Launcher
from .min_max import finish_kernel, plan_reduction, viewed
from .quantized import NO_RANGE
from .tile import program_along

_INF = tl.constexpr(float("inf"))
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
# The magnitude bits of infinity; NaN is above.
_INFINITE_BITS = tl.constexpr(0x7F800000)
# Bins that a program counts in registers: half of them per sign, so with 16 steps per octave the top 8 octaves of what
# it sees first. `tl.histogram` costs a quarter of an instruction per bin and value (perf/codegen.py, sm_90), so all
# 2048 would take 20 times as long as the read; what lies outside, 1 in 80 of normally distributed values, goes to
# memory by itself. All in all 140 instructions per value: predicted at a fifth of an H200's memory rate, not measured.
_WINDOW = 256


@triton.jit
def bin_of(prefix, negative, FIRST_PREFIX: tl.constexpr, PER_SIDE: tl.constexpr):
    """Number of the bin of a float whose magnitude's top bits are ``prefix``: see `tritonq.bins`."""
    outward = tl.minimum(tl.maximum(prefix - (FIRST_PREFIX - 1), 0), PER_SIDE)
    return tl.where(negative, PER_SIDE - outward, PER_SIDE + outward)


@Launcher
@triton.jit
def prefix_histogram_kernel(
    x_ptr,  # outer × rows × cols, by strides
    histogram_ptr,  # (channels, 2 * PER_SIDE + 1) int64, added to
    partial_ptr,  # 2 × splits × channels float32: minima, maxima
    enabled_ptr,  # one uint8, 0 ends the kernel; None counts as 1
    nonfinite_ptr,  # one int64, added to
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
    SHIFT: tl.constexpr,
    FIRST_PREFIX: tl.constexpr,
    PER_SIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Count one share of one tile of channels, and reduce its range. Has run on no GPU yet."""
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

    low = tl.full([ROWS, COLS], _INF, tl.float32)
    high = tl.full([ROWS, COLS], -_INF, tl.float32)
    skipped = tl.zeros([ROWS, COLS], tl.int32)
    HALF: tl.constexpr = WINDOW // 2
    base = 0
    if WINDOW:
        counts = tl.zeros([WINDOW], tl.int32)
        row = row_from + tl.arange(0, ROWS)[:, None]
        col = col_from + tl.arange(0, COLS)[None, :]
        mask = (row < row_to) & (col < col_to) & (outer_from < outer_to)
        x = tl.load(x_ptr + (outer_from * x_outer + row * x_row + col * x_col), mask=mask, other=0).to(tl.float32)
        bits = x.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS
        largest = tl.max(tl.max(tl.where(bits < _INFINITE_BITS, bits, 0), 1), 0)
        # The window ends with the octave of the largest value.
        base = (((largest >> 23) + 1) << (23 - SHIFT)) - HALF

    for outer in range(outer_from, outer_to):
        for row_start in range(row_from, row_to, ROWS):
            for col_start in range(col_from, col_to, COLS):
                row = row_start + tl.arange(0, ROWS)[:, None]
                col = col_start + tl.arange(0, COLS)[None, :]
                mask = (row < rows) & (col < cols)
                x = tl.load(x_ptr + (outer * x_outer + row * x_row + col * x_col), mask=mask, other=0).to(tl.float32)
                bits = x.to(tl.int32, bitcast=True)
                negative = bits < 0
                magnitude = bits & _MAGNITUDE_BITS
                finite = mask & (magnitude < _INFINITE_BITS)
                low = tl.minimum(low, tl.where(finite, x, _INF))
                high = tl.maximum(high, tl.where(finite, x, -_INF))
                skipped += (mask & (magnitude >= _INFINITE_BITS)).to(tl.int32)
                prefix = magnitude >> SHIFT
                alone = finite
                if WINDOW:
                    place = prefix - base
                    inside = finite & (place >= 0) & (place < HALF)
                    index = tl.where(inside, tl.where(negative, place + HALF, place), 0)
                    counts += tl.histogram(
                        tl.reshape(index, [ROWS * COLS]), WINDOW, mask=tl.reshape(inside, [ROWS * COLS])
                    )
                    # Zeros are many after a ReLU: one addition for all of them, below.
                    alone = finite & (inside == 0) & (magnitude != 0)
                    zeros = tl.sum(tl.sum((finite & (inside == 0) & (magnitude == 0)).to(tl.int64), 1), 0)
                    tl.atomic_add(histogram_ptr + PER_SIDE, zeros, mask=zeros > 0)
                at = bin_of(prefix, negative, FIRST_PREFIX, PER_SIDE)
                if CHANNEL is not None:
                    channel = outer if CHANNEL == 0 else (row if CHANNEL == 1 else col)
                    at += channel * (2 * PER_SIDE + 1)
                tl.atomic_add(histogram_ptr + at, tl.full([ROWS, COLS], 1, tl.int64), mask=alone)

    if WINDOW:
        place = tl.arange(0, WINDOW)
        prefix = base + (place & (HALF - 1))
        at = bin_of(prefix, place >= HALF, FIRST_PREFIX, PER_SIDE)
        tl.atomic_add(histogram_ptr + at, counts.to(tl.int64), mask=counts > 0)
    total_skipped = tl.sum(tl.sum(skipped, 1), 0)
    tl.atomic_add(nonfinite_ptr, total_skipped.to(tl.int64), mask=total_skipped > 0)

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
    split_number = (
        program_along(0, FIRST) * split_outer
        + program_along(1, FIRST) * split_row
        + program_along(2, FIRST) * split_col
    )
    partial = split_number * channels + channel
    tl.store(partial_ptr + partial, low, mask=channel < channels)
    tl.store(partial_ptr + splits * channels + partial, high, mask=channel < channels)


@Launcher
@triton.jit
def linear_histogram_kernel(
    x_ptr,  # (channels, length) contiguous
    histogram_ptr,  # (channels, bins) int64, added to
    lo,
    hi,
    width,  # hi - lo, float32
    length,
    bins,
    BLOCK: tl.constexpr,
):
    """Count one block of one channel. Has run on no GPU yet."""
    channel = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + channel * length + at, mask=at < length, other=float("nan")).to(tl.float32)
    inside = (x >= lo) & (x <= hi)
    position = tl.div_rn((x - lo) * bins.to(tl.float32), tl.full([BLOCK], width, tl.float32))
    index = tl.minimum(tl.where(inside, position, 0).to(tl.int32), bins - 1)
    tl.atomic_add(histogram_ptr + channel * bins + index, tl.full([BLOCK], 1, tl.int64), mask=inside)


def linear_histogram(x: Tensor, bins: int, lo: float, hi: float, axis: int | None = None) -> Tensor:
    """Counts over equal bins from ``lo`` to ``hi``: int64, (bins,) or (x.shape[axis], bins)."""
    channels = 1 if axis is None else x.shape[axis]
    rows = x if axis is None else x.movedim(axis, 0)
    rows = rows.reshape(channels, x.numel() // max(1, channels)).contiguous()
    counts = torch.zeros((rows.shape[0], bins), dtype=torch.int64, device=x.device)
    if rows.numel():
        limits = torch.tensor([lo, hi], dtype=torch.float32)
        with device_guard(x):
            linear_histogram_kernel[(triton.cdiv(rows.shape[1], 1024), rows.shape[0])](
                rows,
                counts,
                *limits.tolist(),
                float(limits[1] - limits[0]),
                rows.shape[1],
                bins,
                BLOCK=1024,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return counts[0] if axis is None else counts


def prefix_histogram(x: Tensor, bins: Any, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts over ``bins`` (a `tritonq.bins.FloatPrefixBins`), smallest and largest finite value, values skipped."""
    shape = () if axis is None else (x.shape[axis],)
    counts = torch.zeros((*shape, bins.count), dtype=torch.int64, device=x.device)
    low = torch.full(shape, torch.inf, dtype=torch.float32, device=x.device)
    high = torch.full(shape, -torch.inf, dtype=torch.float32, device=x.device)
    nonfinite = torch.zeros((), dtype=torch.int64, device=x.device)
    observe(x, counts, low, high, nonfinite, None, bins, axis)
    return counts, low, high, nonfinite


def observe(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    enabled: Tensor | None,
    bins: Any,
    axis: int | None,
) -> None:
    """Add ``x`` to a histogram and its range, in place on the device; see the specification."""
    x, seen = viewed(x, axis)
    if seen.channels == 0 or seen.numel == 0:
        return
    tile, parts, launch_grid, split_strides, splits = plan_reduction(x.dtype, seen, x.device, warp_size(x.device))
    partial = torch.empty((2, splits, seen.channels), dtype=torch.float32, device=x.device)
    with device_guard(x):
        prefix_histogram_kernel[launch_grid.programs](
            x,
            histogram,
            partial,
            enabled,
            nonfinite_count,
            *seen.strides[0],
            *seen.sizes,
            *parts.share,
            *split_strides,
            splits,
            seen.channels,
            SHIFT=bins.shift,
            FIRST_PREFIX=bins.first_prefix,
            PER_SIDE=bins.per_side,
            # Several channels would each need a window of their own.
            WINDOW=_WINDOW if seen.channel is None else 0,
            CHANNEL=seen.channel,
            ROWS=tile.rows,
            COLS=tile.cols,
            FIRST=launch_grid.first,
            WIDE=seen.wide,
            num_warps=tile.warps,
        )
        channels = min(triton.next_power_of_2(seen.channels), 32)
        finish_kernel[(triton.cdiv(seen.channels, channels),)](
            partial,
            enabled,
            min_val,
            max_val,
            None,
            None,
            None,
            0.0,
            splits,
            seen.channels,
            **NO_RANGE,
            SPLITS=min(triton.next_power_of_2(splits), 1024 // channels),
            CHANNELS=channels,
            num_warps=4,
            enable_fp_fusion=False,
        )
