"""Backward of the tail of a convolution with BatchNorm: one pass reduces, a small kernel finishes, one pass writes.

``c`` is the convolution's output, ``dy`` the gradient of the tail's result, and ``g`` the part of ``dy`` that ReLU and
quantizer let pass. Nothing but ``c`` and vectors per channel is stored for this: each pass computes ``slope · c +
shift``, the values before ReLU and clip, again. `tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import gradient_bounds, gradient_passes, load_quantizer
from .cached_launch import Launcher
from .channel_tiles import (
    fma,
    load_block,
    next_block,
    partial_tile,
    share_bounds,
    share_channels,
    spread,
    sum_per_channel,
)
from .fake_quant import common_view
from .launch_sizes import device_guard, plan
from .quantized import Grid, grid_constants, grid_pointers
from .reduction import plan_reduction
from .tile import aligned_sizes, aligned_strides, load_per_channel, tile_indices, tile_mask, tile_offsets


@triton.jit
def scan_gradients(
    dy_ptr,  # outer × rows × cols, by strides
    c_ptr,  # outer × rows × cols, by strides
    mean,  # float32, broadcasts against a tile: mean of c per channel
    slope,  # float32, broadcasts against a tile
    shift,  # float32, broadcasts against a tile: the result before the ReLU is slope · c + shift
    unit,  # scalar: the gradient passes where low < (slope · c + shift) / unit < high
    low,  # scalar; with a ReLU the bound is 0 instead
    high,  # scalar
    dy_strides,
    c_strides,
    start,  # of the share along (outer, rows, cols), as is its end
    end,
    blocks,  # of AHEAD tiles
    CEILING: tl.constexpr,
    QUANTIZED: tl.constexpr,  # whether there is a quantizer; without one unit, low and high are not used
    ROUNDING: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SKEW: tl.constexpr,
):
    """Return two (ROWS, COLS) blocks of sums over the tiles of a share: ``Σ g`` and ``Σ g (c - mean)``.

    ``g`` is the part of ``dy`` that ReLU and quantizer let pass. Element (i, j) of each result takes in element (i, j)
    of all tiles of all ``blocks``; missing elements add nothing. Both are float32.
    """
    plain = tl.zeros([ROWS, COLS], tl.float32)
    moment = tl.zeros([ROWS, COLS], tl.float32)
    place = start
    # A missing gradient is zero and adds nothing to either sum.
    gradients = load_block(dy_ptr, dy_strides, place, end, 0, AHEAD, ROWS, COLS, SKEW)
    outputs = load_block(c_ptr, c_strides, place, end, 0, AHEAD, ROWS, COLS, SKEW)
    for _ in range(0, blocks):
        # Loaded before this block is used: see `scan_statistics`.
        place = next_block(place, start, end, AHEAD, ROWS, COLS, SKEW)
        next_gradients = load_block(dy_ptr, dy_strides, place, end, 0, AHEAD, ROWS, COLS, SKEW)
        next_outputs = load_block(c_ptr, c_strides, place, end, 0, AHEAD, ROWS, COLS, SKEW)
        for i in tl.static_range(len(outputs)):
            g = gradients[i][0].to(tl.float32)
            c = outputs[i][0].to(tl.float32)
            if CEILING is not None or QUANTIZED:
                passes = gradient_passes(fma(c, slope, shift), unit, low, high, CEILING, QUANTIZED, ROUNDING)
                g = tl.where(passes, g, 0.0)
            plain += g
            moment = fma(g, c - mean, moment)
        gradients, outputs = next_gradients, next_outputs
    return plain, moment


@Launcher
@triton.jit
def gradient_sums_kernel(
    dy_ptr,  # outer × rows × cols, by strides
    c_ptr,  # outer × rows × cols, by strides
    partial_ptr,  # 2 × splits × channels float32: Σ g, Σ g (c - mean)
    mean_ptr,  # (channels,) float32
    slope_ptr,  # (channels,) float32
    shift_ptr,  # (channels,) float32
    scale_ptr,  # one float32; None without a quantizer
    zero_point_ptr,  # one int32, or None for zero
    active_ptr,  # one element, 0 blocks nothing; None counts as 1
    dy_strides,
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
    CEILING: tl.constexpr,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the partial results ``Σ g`` and ``Σ g (c - mean)`` of one share, the elements that this program reads.

    ``g`` is ``dy`` where ReLU and quantizer of ``slope · c + shift`` let the gradient pass, and 0 elsewhere.
    """
    dy_strides = aligned_strides(dy_strides, ALIGN)
    c_strides = aligned_strides(c_strides, ALIGN)
    sizes = aligned_sizes(sizes, ALIGN)
    start, end, split = share_bounds(sizes, share, split_strides, FIRST, WIDE)
    channel, valid = share_channels(start, channels, CHANNEL, ROWS, COLS)
    mean = spread(tl.load(mean_ptr + channel, mask=valid, other=0.0), CHANNEL)
    slope = spread(tl.load(slope_ptr + channel, mask=valid, other=0.0), CHANNEL)
    shift = spread(tl.load(shift_ptr + channel, mask=valid, other=0.0), CHANNEL)
    scale, zero_point, active = load_quantizer(scale_ptr, zero_point_ptr, active_ptr)
    QUANTIZED: tl.constexpr = scale_ptr is not None
    unit, low, high = gradient_bounds(scale, zero_point, active, CEILING, QUANTIZED, QUANT_MIN, QUANT_MAX, ROUNDING)
    plain, moment = scan_gradients(
        dy_ptr, c_ptr, mean, slope, shift, unit, low, high, dy_strides, c_strides, start, end, blocks,
        CEILING, QUANTIZED, ROUNDING, AHEAD, ROWS, COLS, SKEW,
    )  # fmt: skip
    at = split * channels + channel
    tl.store(partial_ptr + at, sum_per_channel(plain, CHANNEL), mask=valid)
    tl.store(partial_ptr + splits * channels + at, sum_per_channel(moment, CHANNEL), mask=valid)


@Launcher
@triton.jit
def finish_gradients_kernel(
    partial_ptr,  # 2 × splits × channels float32: Σ g, Σ g (c - mean)
    sums_ptr,  # 2 × channels float32, written: Σ g, Σ g n with n = (c - mean) / std
    pull_ptr,  # 2 × channels float32, written: dc = slope · g + pull[0] (c - mean) + pull[1]
    inverse_std_ptr,  # (channels,) float32
    slope_ptr,  # (channels,) float32
    count,  # values per channel
    splits,
    channels,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add the partial results of CHANNELS channels, and write the sums and the factors of the gradient of c.

    The factors are ``pull[0] = -slope / std · Σ g n / count`` and ``pull[1] = -slope · Σ g / count``.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    plain = tl.zeros([SPLITS, CHANNELS], tl.float32)
    moment = tl.zeros([SPLITS, CHANNELS], tl.float32)
    for start in range(0, splits, SPLITS):
        part, mask = partial_tile(start, channel, valid, splits, channels, SPLITS)
        plain += tl.load(partial_ptr + part, mask=mask, other=0.0)
        moment += tl.load(partial_ptr + splits * channels + part, mask=mask, other=0.0)
    inverse_std = tl.load(inverse_std_ptr + channel, mask=valid, other=0.0)
    slope = tl.load(slope_ptr + channel, mask=valid, other=0.0)
    sum_g = tl.sum(plain, 0)
    sum_gn = tl.sum(moment, 0) * inverse_std
    counts = tl.zeros_like(sum_g) - count
    tl.store(sums_ptr + channel, sum_g, mask=valid)
    tl.store(sums_ptr + channels + channel, sum_gn, mask=valid)
    tl.store(pull_ptr + channel, tl.div_rn(slope * inverse_std * sum_gn, counts), mask=valid)
    tl.store(pull_ptr + channels + channel, tl.div_rn(slope * sum_g, counts), mask=valid)


@Launcher
@triton.jit
def gradient_kernel(
    dy_ptr,  # outer × rows × cols, by strides
    c_ptr,  # outer × rows × cols, by strides
    dc_ptr,  # outer × rows × cols, by strides
    mean_ptr,  # (channels,) float32, of c
    slope_ptr,  # (channels,) float32: the result before the ReLU is slope · c + shift
    shift_ptr,  # (channels,) float32
    pull_ptr,  # (channels,) float32: pull[0] of finish_gradients_kernel
    offset_ptr,  # (channels,) float32: pull[1] of finish_gradients_kernel
    scale_ptr,  # one float32; None without a quantizer
    zero_point_ptr,  # one int32, or None for zero
    active_ptr,  # one element, 0: the quantizer is off and blocks nothing; None counts as 1
    dy_strides,
    c_strides,
    dc_strides,
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
    """Write one tile of the gradient of the convolution's output: ``slope · g + pull · (c - mean) + offset``.

    ``g`` is the part of ``dy`` that ReLU and quantizer let pass.
    """
    dy_strides = aligned_strides(dy_strides, ALIGN)
    c_strides = aligned_strides(c_strides, ALIGN)
    dc_strides = aligned_strides(dc_strides, ALIGN)
    sizes = aligned_sizes(sizes, ALIGN)
    place = tile_indices(ROWS, COLS, FIRST, WIDE)
    mask = tile_mask(place, sizes, ROWS)
    g = tl.load(dy_ptr + tile_offsets(place, dy_strides), mask=mask).to(tl.float32)
    c = tl.load(c_ptr + tile_offsets(place, c_strides), mask=mask).to(tl.float32)
    slope = load_per_channel(slope_ptr, place, sizes, CHANNEL, RUN)
    QUANTIZED: tl.constexpr = scale_ptr is not None
    if CEILING is not None or QUANTIZED:
        shift = load_per_channel(shift_ptr, place, sizes, CHANNEL, RUN)
        scale, zero_point, active = load_quantizer(scale_ptr, zero_point_ptr, active_ptr)
        unit, low, high = gradient_bounds(scale, zero_point, active, CEILING, QUANTIZED, QUANT_MIN, QUANT_MAX, ROUNDING)
        passes = gradient_passes(fma(c, slope, shift), unit, low, high, CEILING, QUANTIZED, ROUNDING)
        g = tl.where(passes, g, 0.0)
    mean = load_per_channel(mean_ptr, place, sizes, CHANNEL, RUN)
    pull = load_per_channel(pull_ptr, place, sizes, CHANNEL, RUN)
    offset = load_per_channel(offset_ptr, place, sizes, CHANNEL, RUN)
    dc = fma(g, slope, fma(c - mean, pull, offset))
    tl.store(dc_ptr + tile_offsets(place, dc_strides), dc, mask=mask)


def backward(
    dy: Tensor,
    c: Tensor,
    result: tuple[Tensor, ...],
    grid: Grid | None,
    ceiling: float | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dc, Σ g, Σ g n)``: the gradient of ``c``, and two float32 sums per channel, (channels,).

    ``n = (c - mean) / std`` and ``dc = slope (g - mean(g) - n · mean(g n))``, in the dtype and strides of ``c``.

    Args:
        dy: gradient of the tail's result; ``g`` is the part of it that ReLU and quantizer let pass.
        c: the convolution's output.
        result: the forward's vectors, (channels,) each: mean, 1/std, gain, slope, shift, eps_share.
        grid: the forward's snapshot; None without a quantizer.
        ceiling: upper bound of the ReLU, infinity for a plain one; None without one.
        out: not used: a GPU's allocator hands out again what was freed.
    """
    mean, inverse_std, _, slope, shift, _ = result
    dc = torch.empty_like(c)
    (dy, c), seen = common_view((dy, c), dc, 1)
    shares = plan_reduction(c, seen)
    channels = c.shape[1]
    partial = shares.partial(2, c.device)
    sums = torch.empty((2, channels), dtype=torch.float32, device=c.device)
    pull = torch.empty_like(sums)
    shared = {"CEILING": ceiling, **grid_constants(grid)}
    with device_guard(c):
        gradient_sums_kernel[shares.grid.programs](
            dy,
            c,
            partial,
            mean,
            slope,
            shift,
            *grid_pointers(grid),
            *seen.strides[:2],
            *shares.arguments,
            shares.blocks(reads=2),
            **shared,
            AHEAD=shares.ahead(reads=2),
            ALIGN=seen.alignment,
            SKEW=seen.skew(shares.tile.cols),
            **shares.constants,
        )
        finish_gradients_kernel[shares.joining_programs](
            partial,
            sums,
            pull,
            inverse_std,
            slope,
            float(c.numel() // channels),
            shares.splits,
            channels,
            **shares.joining_constants,
        )
        seen, run = seen.pieces()
        tile, launch = plan("conv_bn_backward", c.dtype, seen, c.device)
        gradient_kernel[launch.programs](
            dy,
            c,
            dc,
            mean,
            slope,
            shift,
            *pull.unbind(0),
            *grid_pointers(grid),
            *seen.strides,
            seen.sizes,
            **shared,
            ALIGN=seen.alignment,
            RUN=run,
            **seen.constants(tile, launch),
        )
    plain, moment = sums
    return dc, plain, moment
