"""The tail of a convolution with BatchNorm: three passes over its output forward, five over it and dy backward.

One pass reduces each channel of the convolution's output c; two small kernels make slope and shift, running statistics
and scale of it; one pass applies them. Sums have a fixed order: the same input gives the same bits. The functions are
specified by `tritonq.reference.conv_bn`. `tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import load_quantizer, merge_range, quantize_value
from .cached_launch import Launcher
from .channel_tiles import (
    fma,
    load_block,
    load_tile,
    max_per_channel,
    min_per_channel,
    next_block,
    partial_tile,
    share_bounds,
    share_channels,
    spread,
    sum_per_channel,
)
from .constants import INF
from .conv_bn_backward import backward
from .fake_quant import common_view
from .launch_sizes import device_guard, plan
from .layout import View
from .quantized import Grid, RangeStatistics, grid_constants, grid_pointers
from .reduction import plan_reduction
from .tile import aligned_sizes, aligned_strides, load_per_channel, tile_indices, tile_mask, tile_offsets

__all__ = ["apply", "backward", "forward"]

# Rows of the partial results of the statistics pass: centre, mean - centre, M2, minimum, maximum, count. The mean is
# in two parts because one float32 at an offset of 1000 would round away what sets the shares apart.
_STATISTICS = 6


@triton.jit
def scan_statistics(
    c_ptr,  # outer × rows × cols, by strides
    centre,  # in c's dtype, broadcasts against a tile: what distances are from, and what missing elements count as
    c_strides,
    start,  # of the share along (outer, rows, cols), as is its end
    end,
    blocks,  # how many blocks the share has, in all: a block is AHEAD[0] × AHEAD[1] × AHEAD[2] tiles
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SKEW: tl.constexpr,
):
    """Return Σ (c - centre), Σ (c - centre)², min c and max c over a share: four (ROWS, COLS) float32 blocks.

    Element (i, j) of each takes in element (i, j) of all tiles of all blocks; missing elements count as ``centre``.
    NaN is in both sums, and may be lost from minimum and maximum.
    """
    about = centre.to(tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    squares = tl.zeros([ROWS, COLS], tl.float32)
    lowest = tl.full([ROWS, COLS], INF, tl.float32)
    highest = tl.full([ROWS, COLS], -INF, tl.float32)
    place = start
    tiles = load_block(c_ptr, c_strides, place, end, centre, AHEAD, ROWS, COLS, SKEW)
    for _ in range(0, blocks):
        # The next block is loaded before this one is used, so that the compiler can't defer its loads.
        place = next_block(place, start, end, AHEAD, ROWS, COLS, SKEW)
        following = load_block(c_ptr, c_strides, place, end, centre, AHEAD, ROWS, COLS, SKEW)
        for i in tl.static_range(len(tiles)):
            c = tiles[i][0].to(tl.float32)
            distance = c - about
            total += distance
            squares = fma(distance, distance, squares)
            lowest = tl.minimum(lowest, c)
            highest = tl.maximum(highest, c)
        tiles = following
    return total, squares, lowest, highest


@Launcher
@triton.jit
def statistics_kernel(
    c_ptr,  # outer × rows × cols, by strides
    partial_ptr,  # 6 × splits × channels float32: centre, mean - centre, M2, minimum, maximum, count
    c_strides,
    sizes,  # (outer, rows, cols)
    share,  # elements that one program reads along each dimension, whole tiles
    split_strides,  # along each dimension: what the program's number there counts in the number of its split
    splits,  # how many there are: partial results per channel
    channels,
    blocks,  # of AHEAD tiles, in a share
    ALIGN: tl.constexpr,
    SKEW: tl.constexpr,
    CHANNEL: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write what ``partial_ptr`` lists, per channel of a share of c: centre is near the mean, M2 ``Σ (c - mean)²``."""
    c_strides = aligned_strides(c_strides, ALIGN)
    sizes = aligned_sizes(sizes, ALIGN)
    start, end, split = share_bounds(sizes, share, split_strides, FIRST, WIDE)
    channel, valid = share_channels(start, channels, CHANNEL, ROWS, COLS)
    first, mask = load_tile(c_ptr, c_strides, start[0], start[1], start[2], sizes, 0, ROWS, COLS, SKEW)
    present = sum_per_channel(tl.where(mask, 1.0, 0.0), CHANNEL)
    mean = tl.div_rn(sum_per_channel(first.to(tl.float32), CHANNEL), tl.maximum(present, 1.0))
    low = min_per_channel(tl.where(mask, first.to(tl.float32), INF), CHANNEL)
    high = max_per_channel(tl.where(mask, first.to(tl.float32), -INF), CHANNEL)
    # Clamped and in c's own dtype, the centre is a value that may stand for missing elements: its distance is zero, and
    # it lies between the smallest and the largest. (Comparisons leave a mean of NaN as it is.)
    mean = tl.where(mean < low, low, mean)
    mean = tl.where(mean > high, high, mean)
    substitute = spread(mean, CHANNEL).to(first.dtype)

    total, squares, lowest, highest = scan_statistics(
        c_ptr, substitute, c_strides, start, end, blocks, AHEAD, ROWS, COLS, SKEW
    )

    outer_extent = 1 if CHANNEL == 0 else end[0] - start[0]
    row_extent = 1 if CHANNEL == 1 else end[1] - start[1]
    col_extent = 1 if CHANNEL == 2 else end[2] - start[2]
    count = (outer_extent * row_extent * col_extent).to(tl.float32)  # type: ignore[union-attr]
    centre = mean.to(c_ptr.dtype.element_ty).to(tl.float32)
    sums = sum_per_channel(total, CHANNEL)
    moved = tl.div_rn(sums, tl.zeros_like(sums) + count)
    second = sum_per_channel(squares, CHANNEL) - sums * moved
    at = split * channels + channel
    step = splits * channels
    tl.store(partial_ptr + at, centre, mask=valid)
    tl.store(partial_ptr + step + at, moved, mask=valid)
    # Rounding may leave a negative trace of zero; NaN stays.
    tl.store(partial_ptr + 2 * step + at, tl.where(second < 0, 0.0, second), mask=valid)
    tl.store(partial_ptr + 3 * step + at, min_per_channel(lowest, CHANNEL), mask=valid)
    tl.store(partial_ptr + 4 * step + at, max_per_channel(highest, CHANNEL), mask=valid)
    tl.store(partial_ptr + 5 * step + at, tl.zeros_like(sums) + count, mask=valid)


@triton.jit
def mean_from(at, step, base, mask):
    """Return ``(centre - base) + rest``, float32 (SPLITS, CHANNELS): each share's mean per channel, minus ``base``.

    ``at`` points to the centres, (SPLITS, CHANNELS); each rest, ``mean - centre``, lies ``step`` elements behind its
    centre. ``base`` (CHANNELS,) is near the means: few digits are lost. Outside ``mask`` the result is ``-base``.
    """
    centre = tl.load(at, mask=mask, other=0.0)
    return (centre - base[None, :]) + tl.load(at + step, mask=mask, other=0.0)


@Launcher
@triton.jit
def finish_kernel(
    partial_ptr,  # 6 × splits × channels float32: centre, mean - centre, M2, minimum, maximum, count of each share
    vectors_ptr,  # 6 × channels float32, written: mean, 1/std, gain, slope, shift, eps_share
    range_ptr,  # 2 × channels float32, written: smallest and largest result before the ReLU; NaN where not finite
    ratio_ptr,  # (channels,) float32: c / ratio is the convolution by the weight before folding
    gamma_ptr,  # (channels,), or None for 1
    beta_ptr,  # (channels,), or None for 0
    bias_ptr,  # (channels,), or None for 0: the convolution's, which c lacks; only the running mean takes it in
    running_mean_ptr,  # (channels,), updated in place with mean / ratio + bias
    running_var_ptr,  # (channels,), updated in place with var / ratio² · unbias
    momentum_ptr,  # one float32, or None: the next argument has it
    momentum,  # weight of this batch in the running statistics
    eps,  # of the BatchNorm
    count,  # values per channel
    unbias,  # count / (count - 1)
    splits,
    channels,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Merge the partial results of CHANNELS channels, and write what follows from mean and variance of c.

    ``std² = var + eps ratio²``, gain |γ|, slope |γ| / std, shift ``β - slope mean``, eps_share ``eps ratio² / std²``.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    step = splits * channels
    base = tl.load(partial_ptr + channel, mask=valid, other=0.0)
    moved = tl.zeros([SPLITS, CHANNELS], tl.float32)
    lowest = tl.full([SPLITS, CHANNELS], INF, tl.float32)
    highest = tl.full([SPLITS, CHANNELS], -INF, tl.float32)
    for start in range(0, splits, SPLITS):
        part, mask = partial_tile(start, channel, valid, splits, channels, SPLITS)
        at = partial_ptr + part
        moved += tl.load(at + 5 * step, mask=mask, other=0.0) * mean_from(at, step, base, mask)
        lowest = tl.minimum(lowest, tl.load(at + 3 * step, mask=mask, other=INF))
        highest = tl.maximum(highest, tl.load(at + 4 * step, mask=mask, other=-INF))
    counts = tl.zeros_like(base) + count
    shifted = tl.div_rn(tl.sum(moved, 0), counts)
    mean = base + shifted
    second = tl.zeros([SPLITS, CHANNELS], tl.float32)
    for start in range(0, splits, SPLITS):
        part, mask = partial_tile(start, channel, valid, splits, channels, SPLITS)
        at = partial_ptr + part
        away = mean_from(at, step, base, mask) - shifted[None, :]
        size = tl.load(at + 5 * step, mask=mask, other=0.0)
        second += tl.load(at + 2 * step, mask=mask, other=0.0) + size * (away * away)
    var = tl.div_rn(tl.sum(second, 0), counts)

    ratio = tl.load(ratio_ptr + channel, mask=valid, other=1.0)
    squared = ratio * ratio
    eps_part = squared * eps
    variance = var + eps_part
    inverse_std = tl.div_rn(1.0, tl.sqrt_rn(variance))
    gain = tl.zeros_like(mean) + 1.0
    if gamma_ptr is not None:
        gain = tl.abs(tl.load(gamma_ptr + channel, mask=valid, other=0.0).to(tl.float32))
    slope = gain * inverse_std
    beta = tl.zeros_like(mean)
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    shift = fma(-slope, mean, beta)
    out = vectors_ptr + channel
    tl.store(out, mean, mask=valid)
    tl.store(out + channels, inverse_std, mask=valid)
    tl.store(out + 2 * channels, gain, mask=valid)
    tl.store(out + 3 * channels, slope, mask=valid)
    tl.store(out + 4 * channels, shift, mask=valid)
    tl.store(out + 5 * channels, tl.div_rn(eps_part, variance), mask=valid)

    # The result is monotone in c, and rounding keeps order: these are its extremes, bit for bit. NaN hides from minimum
    # and maximum but not from the mean; an infinite mean makes the slope NaN.
    finite = (tl.abs(mean) < INF) & (tl.abs(slope) < INF)
    nan = float("nan")
    tl.store(range_ptr + channel, tl.where(finite, fma(tl.min(lowest, 0), slope, shift), nan), mask=valid)
    tl.store(range_ptr + channels + channel, tl.where(finite, fma(tl.max(highest, 0), slope, shift), nan), mask=valid)

    if momentum_ptr is not None:
        momentum = tl.load(momentum_ptr)
    batch_mean = tl.div_rn(mean, ratio)
    if bias_ptr is not None:
        batch_mean += tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    batch_var = tl.div_rn(var, squared) * unbias
    running_mean = tl.load(running_mean_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    running_var = tl.load(running_var_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    tl.store(running_mean_ptr + channel, running_mean + (batch_mean - running_mean) * momentum, mask=valid)
    tl.store(running_var_ptr + channel, running_var + (batch_var - running_var) * momentum, mask=valid)


@Launcher
@triton.jit
def apply_kernel(
    c_ptr,  # outer × rows × cols, by strides
    y_ptr,  # outer × rows × cols, by strides
    slope_ptr,  # (channels,) float32
    shift_ptr,  # (channels,) float32
    scale_ptr,  # one float32; None without a quantizer
    zero_point_ptr,  # one int32, or None for zero
    active_ptr,  # one element, 0 leaves y unrounded; None counts as 1
    c_strides,
    y_strides,
    sizes,
    ALIGN: tl.constexpr,
    RUN: tl.constexpr,
    CHANNEL: tl.constexpr,
    CEILING: tl.constexpr,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write one tile of ``y = FQ(relu?(slope · c + shift))``, slope and shift per channel."""
    c_strides = aligned_strides(c_strides, ALIGN)
    y_strides = aligned_strides(y_strides, ALIGN)
    sizes = aligned_sizes(sizes, ALIGN)
    place = tile_indices(ROWS, COLS, FIRST, WIDE)
    mask = tile_mask(place, sizes, ROWS)
    c = tl.load(c_ptr + tile_offsets(place, c_strides), mask=mask).to(tl.float32)
    slope = load_per_channel(slope_ptr, place, sizes, CHANNEL, RUN)
    shift = load_per_channel(shift_ptr, place, sizes, CHANNEL, RUN)
    scale, zero_point, active = load_quantizer(scale_ptr, zero_point_ptr, active_ptr)
    QUANTIZED: tl.constexpr = scale_ptr is not None
    y = fma(c, slope, shift)
    y = quantize_value(y, scale, zero_point, active, CEILING, QUANTIZED, QUANT_MIN, QUANT_MAX, ROUNDING)
    tl.store(y_ptr + tile_offsets(place, y_strides), y, mask=mask)


def forward(
    c: Tensor,  # (batch, channels, ...), without the convolution's bias; at least two values per channel
    ratio: Tensor,  # (channels,) float32: fold over unit of the weight codes
    gamma: Tensor | None,  # (channels,), or None for 1
    beta: Tensor | None,  # (channels,), or None for 0
    bias: Tensor | None,  # of the convolution, (channels,), or None for 0
    norm: Any,  # the BatchNorm's running_mean, running_var (both updated in place), momentum (number or tensor), eps
    grid: Grid | None,  # of the result, updated in place; None: no FQ, and no snapshot
    statistics: RangeStatistics | None,  # the running range behind the grid, updated in place; None: the grid stays
    ceiling: float | None,  # upper bound of the ReLU, infinity for a plain one, None without one
) -> tuple[Tensor, tuple[Tensor, ...], Grid | None]:
    """Return ``FQ(relu?(BN(c / ratio + bias)))`` in c's dtype and strides, six vectors, and a snapshot of the grid.

    BN takes the batch's statistics. The vectors, (channels,) float32, are mean of c, 1/std, |γ|, slope, shift and ``eps
    ratio² / std²``: ``std² = var + eps ratio²``, var is c's biased variance. Before the ReLU: ``slope · c + shift``.
    """
    grid_constants(grid)  # refuses float codes before statistics are updated
    y = torch.empty_like(c)
    (c,), seen = common_view((c,), y, 1)
    vectors, extremes = _statistics(c, seen, ratio, gamma, beta, bias, norm)
    snapshot = None
    if grid is not None:
        with device_guard(c):
            snapshot = merge_range(extremes[0], extremes[1], c.numel() // c.shape[1], grid, statistics, ceiling)
    _apply(c, y, seen, vectors[3], vectors[4], snapshot, ceiling)
    return y, vectors.unbind(0), snapshot


def apply(c: Tensor, slope: Tensor, shift: Tensor, grid: Grid | None, ceiling: float | None) -> Tensor:
    """Return ``FQ(relu?(slope · c + shift))`` in c's dtype and strides: the last pass of :func:`forward`.

    Slope and shift are (channels,) float32. No ``grid``: not rounded; no ``ceiling``, the ReLU's upper bound: no ReLU.
    """
    y = torch.empty_like(c)
    (c,), seen = common_view((c,), y, 1)
    _apply(c, y, seen, slope, shift, grid, ceiling)
    return y


def _apply(
    c: Tensor, y: Tensor, seen: View, slope: Tensor, shift: Tensor, grid: Grid | None, ceiling: float | None
) -> None:
    seen, run = seen.pieces()
    tile, launch = plan("conv_bn_apply", c.dtype, seen, c.device)
    with device_guard(c):
        apply_kernel[launch.programs](
            c,
            y,
            slope,
            shift,
            *grid_pointers(grid),
            *seen.strides,
            seen.sizes,
            CEILING=ceiling,
            **grid_constants(grid),
            ALIGN=seen.alignment,
            RUN=run,
            **seen.constants(tile, launch),
        )


def _statistics(
    c: Tensor,
    seen: View,
    ratio: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    norm: Any,
) -> tuple[Tensor, Tensor]:
    """Return mean, 1/std, gain, slope, shift, eps_share (6, channels), and the ends of the result (2, channels)."""
    shares = plan_reduction(c, seen)
    channels = c.shape[1]
    count = c.numel() // channels
    partial = shares.partial(_STATISTICS, c.device)
    vectors = torch.empty((6, channels), dtype=torch.float32, device=c.device)
    extremes = torch.empty((2, channels), dtype=torch.float32, device=c.device)
    momentum = norm.momentum.float() if isinstance(norm.momentum, Tensor) else None
    with device_guard(c):
        statistics_kernel[shares.grid.programs](
            c,
            partial,
            seen.strides[0],
            *shares.arguments,
            shares.blocks(),
            AHEAD=shares.ahead(),
            ALIGN=seen.alignment,
            SKEW=seen.skew(shares.tile.cols),
            **shares.constants,
        )
        finish_kernel[shares.joining_programs](
            partial,
            vectors,
            extremes,
            ratio,
            gamma,
            beta,
            bias,
            norm.running_mean,
            norm.running_var,
            momentum,
            0.0 if momentum is not None else norm.momentum,
            norm.eps,
            float(count),
            count / (count - 1),
            shares.splits,
            channels,
            **shares.joining_constants,
        )
    return vectors, extremes
