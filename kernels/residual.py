"""Residual joins: two reads of both inputs, one write, and one bit per element for the backward.

Functions here have the names, signatures and results of `tritonq.reference.residual`, their specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import (
    gradient_bounds,
    gradient_passes,
    load_quantizer,
    merge_range,
    quantize_value,
)
from .constants import INF
from .launch import device_guard, programs_that_fill, warp_size
from .launcher import Launcher
from .quantized import Grid, RangeStatistics, grid_constants, grid_pointers, observing_switch

# Planes start on 16 elements, so that every dtype is read 128 bits at a time.
_ALIGNMENT = 16
# Planes of a mask: one for each bit of a byte.
_PLANES = 8
# Bytes of the mask per program, 8 to a lane: 128-bit accesses to 16-bit elements.
_BLOCK = 1024
_LANES_PER_PROGRAM = 128
_RANGE_BLOCK = 2048


@triton.jit
def scan_sums(a_ptr, b_ptr, start, end, BLOCK: tl.constexpr, FINITE_ONLY: tl.constexpr):
    """Elementwise minimum and maximum of ``a + b`` over a share, and the count of values skipped, (BLOCK,) each.

    Without FINITE_ONLY nothing is skipped and NaN propagates.
    """
    low = tl.full([BLOCK], INF, tl.float32)
    high = tl.full([BLOCK], -INF, tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    # Stands in for missing elements.
    first_a = tl.load(a_ptr + start)
    first_b = tl.load(b_ptr + start)
    for at in range(start, end, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        mask = offsets < end
        a = tl.load(a_ptr + offsets, mask=mask, other=first_a).to(tl.float32)
        total = a + tl.load(b_ptr + offsets, mask=mask, other=first_b).to(tl.float32)
        if FINITE_ONLY:
            finite = tl.abs(total) < INF
            low = tl.minimum(low, tl.where(finite, total, INF))
            high = tl.maximum(high, tl.where(finite, total, -INF))
            bad += (mask & (finite == 0)).to(tl.int32)
        else:
            low = tl.minimum(low, total, propagate_nan=tl.PropagateNan.ALL)
            high = tl.maximum(high, total, propagate_nan=tl.PropagateNan.ALL)
    return low, high, bad


@Launcher
@triton.jit
def join_range_kernel(
    a_ptr,  # (n,)
    b_ptr,  # (n,)
    low_ptr,  # (programs,) float32
    high_ptr,  # (programs,) float32
    nonfinite_ptr,  # one int64, grows by the number of values skipped
    observing_ptr,  # one uint8, 0 ends the kernel
    n,
    share,  # elements per program: whole blocks
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Range of the finite sums of one share. Has run on no GPU yet."""
    if tl.load(observing_ptr) == 0:
        return
    program = tl.program_id(0)
    start = program.to(tl.int64) * share if WIDE else program * share
    end = tl.minimum(start + share, n)
    low, high, _ = scan_sums(a_ptr, b_ptr, start, end, BLOCK, False)
    skipped = 0
    if tl.max(((tl.abs(low) < INF) & (tl.abs(high) < INF) & (low == low)).to(tl.int32) ^ 1, 0) > 0:
        # Rare: a sum is NaN or infinite. Read the share again and leave those out.
        low, high, bad = scan_sums(a_ptr, b_ptr, start, end, BLOCK, True)
        skipped = tl.sum(bad, 0)
    # A share without finite sums merges as zero elements would: its empty range is not finite and is skipped.
    tl.store(low_ptr + program, tl.min(low, 0))
    tl.store(high_ptr + program, tl.max(high, 0))
    if skipped > 0:
        tl.atomic_add(nonfinite_ptr, skipped.to(tl.int64))  # type: ignore[attr-defined]


@Launcher
@triton.jit
def join_kernel(
    a_ptr,  # (n,)
    b_ptr,  # (n,)
    y_ptr,  # (n,)
    mask_ptr,  # (plane,) uint8, or None
    scale_ptr,  # one element each, or None without a quantizer
    zero_point_ptr,
    active_ptr,
    n,
    plane,
    CEILING: tl.constexpr,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``FQ(relu?(a + b))`` of one block of each plane, and their byte of mask. Has run on no GPU yet."""
    program = tl.program_id(0)
    at = (program.to(tl.int64) if WIDE else program) * COLS + tl.arange(0, COLS)
    scale, zero_point, active = load_quantizer(scale_ptr, zero_point_ptr, active_ptr)
    QUANTIZED: tl.constexpr = scale_ptr is not None
    unit, low, high = gradient_bounds(scale, zero_point, active, CEILING, QUANTIZED, QUANT_MIN, QUANT_MAX, ROUNDING)
    byte = tl.zeros([COLS], tl.int32)
    for bit in tl.static_range(ROWS):
        offsets = bit * plane + at
        mask = (at < plane) & (offsets < n)
        a = tl.load(a_ptr + offsets, mask=mask, other=0).to(tl.float32)
        total = a + tl.load(b_ptr + offsets, mask=mask, other=0).to(tl.float32)
        y = quantize_value(total, scale, zero_point, active, CEILING, QUANTIZED, QUANT_MIN, QUANT_MAX, ROUNDING)
        tl.store(y_ptr + offsets, y, mask=mask)
        passes = gradient_passes(total, unit, low, high, CEILING, QUANTIZED, ROUNDING)
        byte += (mask & passes).to(tl.int32) << bit
    tl.store(mask_ptr + at, byte.to(tl.uint8), mask=at < plane)


@Launcher
@triton.jit
def join_backward_kernel(
    dy_ptr,  # (n,)
    mask_ptr,  # (plane,) uint8
    g_ptr,  # (n,)
    n,
    plane,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``dy`` where its bit is set, else 0. Has run on no GPU yet."""
    program = tl.program_id(0)
    at = (program.to(tl.int64) if WIDE else program) * COLS + tl.arange(0, COLS)
    byte = tl.load(mask_ptr + at, mask=at < plane, other=0).to(tl.int32)
    for bit in tl.static_range(ROWS):
        offsets = bit * plane + at
        mask = (at < plane) & (offsets < n)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0)
        tl.store(g_ptr + offsets, tl.where(((byte >> bit) & 1) != 0, dy, 0.0), mask=mask)


def forward(
    a: Tensor, b: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None
) -> tuple[Tensor, Tensor]:
    """``FQ(relu?(a + b))``, dense, and the mask of the gradient."""
    y = torch.empty_like(a)
    # Elements pair up in memory order: both inputs take the result's layout, by a copy where they must.
    a, b = (t if t.stride() == y.stride() else torch.empty_like(y).copy_(t) for t in (a, b))
    n = a.numel()
    plane = -(-n // (_PLANES * _ALIGNMENT)) * _ALIGNMENT
    mask = torch.empty(plane, dtype=torch.uint8, device=a.device)
    if n == 0:
        return y, mask
    with device_guard(a):
        snapshot = None if grid is None else _observe(a, b, grid, statistics, ceiling)
        join_kernel[(triton.cdiv(plane, _BLOCK),)](
            a,
            b,
            y,
            mask,
            *grid_pointers(snapshot),
            n,
            plane,
            CEILING=ceiling,
            **grid_constants(snapshot),
            ROWS=_PLANES,
            COLS=_BLOCK,
            WIDE=_is_wide(n),
            num_warps=_LANES_PER_PROGRAM // warp_size(a.device),
            enable_fp_fusion=False,
        )
    return y, mask


def backward(dy: Tensor, mask: Tensor) -> Tensor:
    """``dy`` where the mask's bit is set; ``dy`` is dense, in the memory order of the forward's result."""
    g = torch.empty_like(dy)
    plane = mask.numel()
    if dy.numel() == 0:
        return g
    with device_guard(dy):
        join_backward_kernel[(triton.cdiv(plane, _BLOCK),)](
            dy,
            mask,
            g,
            dy.numel(),
            plane,
            ROWS=_PLANES,
            COLS=_BLOCK,
            WIDE=_is_wide(dy.numel()),
            num_warps=_LANES_PER_PROGRAM // warp_size(dy.device),
        )
    return g


def _observe(a: Tensor, b: Tensor, grid: Grid, statistics: RangeStatistics | None, ceiling: float | None) -> Grid:
    """Observe the sums and return a snapshot of the grid."""
    n = a.numel()
    blocks = triton.cdiv(n, _RANGE_BLOCK)
    programs = min(blocks, programs_that_fill(a.device))
    share = triton.cdiv(blocks, programs) * _RANGE_BLOCK
    programs = triton.cdiv(n, share)
    low, high = torch.empty((2, programs), dtype=torch.float32, device=a.device).unbind(0)
    observing = observing_switch(statistics)
    if statistics is not None and observing is not None:
        join_range_kernel[(programs,)](
            a,
            b,
            low,
            high,
            statistics.nonfinite_count,
            observing,
            n,
            share,
            BLOCK=_RANGE_BLOCK,
            WIDE=_is_wide(n),
            num_warps=_LANES_PER_PROGRAM // warp_size(a.device),
            enable_fp_fusion=False,
        )
    return merge_range(low, high, 0, grid, statistics, ceiling)


def _is_wide(n: int) -> bool:
    return n >= 2**31 - _PLANES * _BLOCK
