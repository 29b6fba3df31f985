"""Running ranges: one read of the batch; the range, its scale and its zero point never leave the device.

Two stages in a fixed order and no floating-point atomics: the same input gives the same bits. If one program reads the
whole of a channel, it also updates the range, in the same launch (SINGLE). Functions here have the names, signatures
and results of `tritonq.reference.min_max`, their specification. `tritonq.kernels` explains the constants that have no
comment.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached_launch import Launcher
from .channel_tiles import (
    load_block,
    max_per_channel,
    min_per_channel,
    next_block,
    partial_tile,
    share_bounds,
    share_channels,
    share_offsets,
)
from .constants import FALL, INF
from .launch_sizes import device_guard
from .qparams import range_to_qparams
from .quantized import NO_RANGE, Grid, RangeStatistics, range_constants
from .reduction import plan_reduction, viewed


@triton.jit
def scan_min_max(
    x_ptr,  # outer × rows × cols, by strides
    first,  # in x's dtype, broadcasts against a tile: an element of each channel, stands in for missing elements
    x_strides,
    start,  # of the share along (outer, rows, cols), as is its end
    end,
    blocks,  # number of blocks of AHEAD tiles in the share
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FINITE_ONLY: tl.constexpr,
):
    """Return minimum and maximum over a share's tiles, float32 (ROWS, COLS), and the number of values left out, int64.

    With FINITE_ONLY NaN and infinities are left out, and counted, one number for the share. Where all elements at a
    place of the tiles are left out, the minimum is +inf and the maximum -inf. Without FINITE_ONLY nothing is left out,
    NaN propagates, and the number is 0.
    """
    low = tl.full([ROWS, COLS], INF, tl.float32)
    high = tl.full([ROWS, COLS], -INF, tl.float32)
    skipped = tl.zeros([], tl.int64)
    place = start
    tiles = load_block(x_ptr, x_strides, place, end, first, AHEAD, ROWS, COLS)
    for _ in range(0, blocks):
        # The next block is loaded before this one is used, so that the compiler can't defer its loads.
        place = next_block(place, start, end, AHEAD, ROWS, COLS)
        following = load_block(x_ptr, x_strides, place, end, first, AHEAD, ROWS, COLS)
        for i in tl.static_range(len(tiles)):
            x = tiles[i][0].to(tl.float32)
            if FINITE_ONLY:
                finite = tl.abs(x) < INF
                low = tl.minimum(low, tl.where(finite, x, INF))
                high = tl.maximum(high, tl.where(finite, x, -INF))
                skipped += tl.sum((tiles[i][1] & (finite == 0)).to(tl.int32))
            else:
                low = tl.minimum(low, x, propagate_nan=tl.PropagateNan.ALL)
                high = tl.maximum(high, x, propagate_nan=tl.PropagateNan.ALL)
        tiles = following
    return low, high, skipped


@triton.jit
def update_range(
    low,  # (n,) float32, a batch's minima; +inf where it had no finite value
    high,  # (n,) float32, a batch's maxima; -inf where it had no finite value
    channel,  # (n,) channel numbers
    valid,  # (n,) which of them exist
    min_ptr,  # (channels,) float32, updated in place
    max_ptr,  # (channels,) float32, updated in place
    scale_ptr,  # (channels,) float32; None: neither scale nor zero point is written
    zero_point_ptr,  # (channels,) int32, or None: the type fixes it, and nobody keeps it
    averaging_constant,  # weight of the new batch; None for a running minimum and maximum
    eps,  # smallest scale
    QUANT_MIN: tl.constexpr,  # smallest code
    QUANT_MAX: tl.constexpr,  # largest code
    SYMMETRIC: tl.constexpr,  # whether the type has a symmetric range
    FIXED_ZERO_POINT: tl.constexpr,  # the zero point that the type fixes, or None
    RULE: tl.constexpr,  # "torch", "torch_v1" or "megengine": how a range becomes scale and zero point
    COPY_ABOVE: tl.constexpr,  # growth beyond which the batch's range replaces the running one, or None
):
    """Merge a batch's range into the running one, and write the scale and zero point that follow.

    Running extremes without ``averaging_constant``; else ``running + constant · (batch - running)``. A batch replaces
    the range of an average if that is empty (minimum above maximum); with COPY_ABOVE so does one whose magnitude
    ``max(-low, high)`` is more than COPY_ABOVE times the running one's, or less than 1/100 of it but not 0. A channel
    without a finite value in the batch keeps its range; scale and zero point are written all the same.
    """
    min_val = tl.load(min_ptr + channel, mask=valid, other=INF)
    max_val = tl.load(max_ptr + channel, mask=valid, other=-INF)
    if averaging_constant is None:
        min_val = tl.minimum(min_val, low)
        max_val = tl.maximum(max_val, high)
    else:
        seen = min_val <= max_val
        if COPY_ABOVE is not None:
            # In float64, where the product is rounded as Python rounds it.
            running = tl.maximum(-min_val, max_val).to(tl.float64)
            batch = tl.maximum(-low, high).to(tl.float64)
            seen = seen & (batch <= COPY_ABOVE * running) & ((running <= batch * FALL) | (batch == 0))
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
        if zero_point_ptr is not None:
            tl.store(zero_point_ptr + channel, zero_point, mask=valid)


@Launcher
@triton.jit
def observe_kernel(
    x_ptr,  # outer × rows × cols, by strides
    partial_ptr,  # 2 × splits × channels float32: minima, maxima; None with SINGLE
    enabled_ptr,  # one uint8, 0 ends the kernel; None counts as 1
    nonfinite_ptr,  # one int64, grows by the number of values that are NaN or infinite
    min_ptr,  # (channels,) float32: running minimum, updated in place with SINGLE, else not read
    max_ptr,  # (channels,) float32: running maximum, likewise
    scale_ptr,  # (channels,) float32, written with SINGLE; None without a grid
    zero_point_ptr,  # (channels,) int32, written with SINGLE; None without a grid, or where the type fixes it
    averaging_constant,
    eps,
    x_strides,
    sizes,  # (outer, rows, cols)
    share,  # elements that one program reads along each dimension, whole tiles
    split_strides,  # along each dimension: factor of the program's number there; the products' sum numbers its split
    splits,  # how many there are: partial results per channel
    channels,
    blocks,  # number of blocks of AHEAD tiles in a share
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED_ZERO_POINT: tl.constexpr,
    RULE: tl.constexpr,
    COPY_ABOVE: tl.constexpr,
    CHANNEL: tl.constexpr,
    SINGLE: tl.constexpr,  # one program reads the whole of a channel
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the smallest and largest finite value that each channel has in one share, which may hold several channels.

    They are +inf and -inf for a channel without one. With SINGLE they are not written, but update the channels' ranges,
    scales and zero points.
    """
    if enabled_ptr is not None and tl.load(enabled_ptr) == 0:
        return
    start, end, split = share_bounds(sizes, share, split_strides, FIRST, WIDE)

    # A share is empty only where the tensor is; nothing may be read then.
    exists = (start[0] < end[0]) & (start[1] < end[1]) & (start[2] < end[2])
    if CHANNEL == 1:
        row = start[1] + tl.arange(0, ROWS)[:, None]
        first = tl.load(
            x_ptr + share_offsets((start[0], row, start[2]), x_strides), mask=(row < sizes[1]) & exists, other=0
        )
    elif CHANNEL == 2:
        col = start[2] + tl.arange(0, COLS)[None, :]
        first = tl.load(
            x_ptr + share_offsets((start[0], start[1], col), x_strides), mask=(col < sizes[2]) & exists, other=0
        )
    else:
        first = tl.load(x_ptr + share_offsets(start, x_strides), mask=exists, other=0)

    low, high, _ = scan_min_max(x_ptr, first, x_strides, start, end, blocks, AHEAD, ROWS, COLS, False)
    unclean = ((tl.abs(low) < INF) & (tl.abs(high) < INF)) == 0
    if tl.max(unclean.to(tl.int32)) > 0:
        # Rare: a value is NaN or infinite. Read the share again and leave those out.
        low, high, skipped = scan_min_max(x_ptr, first, x_strides, start, end, blocks, AHEAD, ROWS, COLS, True)
        # An integer sum is the same in any order.
        tl.atomic_add(nonfinite_ptr, skipped)
    low, high = min_per_channel(low, CHANNEL), max_per_channel(high, CHANNEL)
    channel, valid = share_channels(start, channels, CHANNEL, ROWS, COLS)

    if SINGLE:
        update_range(
            low, high, channel, valid, min_ptr, max_ptr, scale_ptr, zero_point_ptr, averaging_constant, eps,
            QUANT_MIN, QUANT_MAX, SYMMETRIC, FIXED_ZERO_POINT, RULE, COPY_ABOVE,
        )  # fmt: skip
    else:
        partial_index = split * channels + channel
        tl.store(partial_ptr + partial_index, low, mask=valid)
        tl.store(partial_ptr + splits * channels + partial_index, high, mask=valid)


@Launcher
@triton.jit
def finish_kernel(
    partial_ptr,  # 2 × splits × channels float32: minima, maxima
    enabled_ptr,  # one uint8, 0 ends the kernel; None counts as 1
    min_ptr,  # (channels,) float32: running minimum, updated in place
    max_ptr,  # (channels,) float32: running maximum, updated in place
    scale_ptr,  # (channels,) float32, written; None without a grid
    zero_point_ptr,  # (channels,) int32, written; None without a grid, or where the type fixes it
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
    """Merge CHANNELS channels' smallest and largest values of all shares into their running ranges.

    Scale and zero point that follow are written, too, if there is a grid.
    """
    if enabled_ptr is not None and tl.load(enabled_ptr) == 0:
        return
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    low = tl.full([SPLITS, CHANNELS], INF, tl.float32)
    high = tl.full([SPLITS, CHANNELS], -INF, tl.float32)
    for start in range(0, splits, SPLITS):
        part, mask = partial_tile(start, channel, valid, splits, channels, SPLITS)
        low = tl.minimum(low, tl.load(partial_ptr + part, mask=mask, other=INF))
        high = tl.maximum(high, tl.load(partial_ptr + splits * channels + part, mask=mask, other=-INF))
    update_range(
        tl.min(low, 0), tl.max(high, 0), channel, valid, min_ptr, max_ptr, scale_ptr, zero_point_ptr,
        averaging_constant, eps, QUANT_MIN, QUANT_MAX, SYMMETRIC, FIXED_ZERO_POINT, RULE, COPY_ABOVE,
    )  # fmt: skip


def min_max(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest and the largest finite value of ``x``, and how many values are not finite.

    Args:
        x: float32, float16 or bfloat16; may be empty.
        axis: that of the channels, may be negative; None: all values together.

    Returns:
        ``(smallest, largest, count)`` on the device of ``x``: float32, 0-d or (channels,), and int64, 0-d for all
        channels together. Without a finite value, as in an empty ``x``, they are +inf and -inf.
    """
    shape = () if axis is None else (x.shape[axis],)
    low = torch.full(shape, torch.inf, dtype=torch.float32, device=x.device)
    high = torch.full(shape, -torch.inf, dtype=torch.float32, device=x.device)
    nonfinite = torch.zeros((), dtype=torch.int64, device=x.device)
    _observe(x, axis, (low, high, None, None, None, 0.0), nonfinite, None, NO_RANGE)
    return low, high, nonfinite


def observe(x: Tensor, statistics: RangeStatistics, grid: Grid | None = None) -> None:
    """Update a running range with ``x``, and the scale and zero point of ``grid`` that follow, in place on the device.

    The range takes the extremes of all batches, or with ``statistics.averaging_constant`` c ``r + c · (batch - r)``;
    the first batch replaces the empty range. With ``statistics.copy_above`` an average is replaced by a batch whose
    magnitude ``max(-min, max)`` is more than that times its own, or less than 1/100 of it but not 0. NaN and infinities
    are left out, and counted in ``statistics.nonfinite_count``. While ``statistics.frozen`` is True, or the range's
    switch is 0, nothing is written; without ``grid`` only range and count are updated. Each index of the axis
    ``statistics.granularity.axis`` has a range of its own; axis None: one range for all values.
    """
    if statistics.frozen:
        return
    scale, zero_point, constants = None, None, {**NO_RANGE, "COPY_ABOVE": statistics.copy_above}
    if grid is not None:
        scale, zero_point, constants = grid.scale, grid.zero_point, range_constants(grid, statistics)
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
    """Launch one kernel, or a second one if several programs share a channel.

    Args:
        x: the batch.
        axis: that of the channels, or None.
        state: minimum, maximum, scale, zero point (or None), averaging constant and eps, as the kernels take them.
        nonfinite_count: int64, grows by the values that are left out.
        enabled: the switch, or None for on.
        constants: of the rule that turns a range into scale and zero point, from ``range_constants``.
    """
    x, seen = viewed(x, axis)
    if seen.channels == 0:
        return
    shares = plan_reduction(x, seen)
    partial = shares.partial(2, x.device) if shares.splits > 1 else None
    with device_guard(x):
        observe_kernel[shares.grid.programs](
            x,
            partial,
            enabled,
            nonfinite_count,
            *state,
            *seen.strides,
            *shares.arguments,
            shares.blocks(),
            **constants,
            SINGLE=shares.splits == 1,
            AHEAD=shares.ahead(),
            **shares.constants,
        )
        if partial is not None:
            finish_kernel[shares.joining_programs](
                partial,
                enabled,
                *state,
                shares.splits,
                shares.channels,
                **constants,
                **shares.joining_constants,
            )
