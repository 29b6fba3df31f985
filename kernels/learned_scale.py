"""Learned scales: forward as fake quantization; backward two reads, one write, and a reduction in a fixed order.

The *parameter* is what training learns: the scale, or the clipping level for method ``"pact"``. Each program sums its
share per channel in registers and stores one partial result; a second, small kernel adds those in the order of their
numbers, so the same input gives the same bits. Functions here have the names and signatures of
`tritonq.reference.learned_scale`, their specification. `tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached_launch import Launcher
from .channel_tiles import partial_tile, share_bounds, share_channels, share_offsets, share_tile, sum_per_channel
from .fake_quant import common_view, fake_quantize
from .launch_sizes import device_guard, plan
from .quantized import Grid, grid_constants, grid_pointers
from .reduction import plan_reduction
from .rounding import divide_by_scale, is_inside, round_half_away, round_to_steps
from .tile import load_per_channel, tile_indices, tile_mask, tile_offsets


@triton.jit
def learned_terms(
    x,
    parameter,
    zero_point,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    METHOD: tl.constexpr,
):
    """Return a bool block of where the gradient of x passes, and d y / d parameter for each value, float32.

    With y the rounded x, ``v = x / parameter``, z the zero point, code between the ends QUANT_MIN and QUANT_MAX, and
    *the end* the one of them on whose side x lies:

    - ``"torch"``: passes where ``round(v) + z`` is a code; ``code - z - v`` there, else ``end - z``.
    - ``"megengine"``: passes where ``QUANT_MIN <= v + z <= QUANT_MAX``; ``round(v + z) - (v + z)`` there, else the end.
    - ``"tqt"``: passes where ``QUANT_MIN - 0.5 <= v <= QUANT_MAX + 0.5``; ``code - v`` there, else the end.
    - ``"pact"``: passes where ``0 <= x < parameter``; 1 where ``x >= parameter``, else 0.

    At NaN the gradient does not pass, and the second block is not to be used.

    Args:
        x: float32 block.
        parameter: float32 that broadcasts against ``x``: the scale; the clipping level for ``"pact"``.
        zero_point: float32 integer, as ``parameter``, or the constant 0; read by ``"torch"`` and ``"megengine"``.
        QUANT_MIN: smallest code.
        QUANT_MAX: largest code.
        ROUNDING: of ties, ``"half_even"`` or ``"half_away"``; read by ``"torch"``. ``"megengine"`` and ``"tqt"`` round
            half away, ``"pact"`` rounds nothing here.
        METHOD: ``"torch"``, ``"megengine"``, ``"tqt"`` or ``"pact"``.
    """
    if METHOD == "pact":
        return (x >= 0) & (x < parameter), (x >= parameter).to(tl.float32)
    elif METHOD == "torch":
        v = divide_by_scale(x, parameter, ROUNDING)
        inside = is_inside(v, zero_point, QUANT_MIN, QUANT_MAX, ROUNDING)
        steps = round_to_steps(v, zero_point, QUANT_MIN, QUANT_MAX, ROUNDING)
        return inside, tl.where(inside, steps - v, steps)
    elif METHOD == "megengine":
        v = divide_by_scale(x, parameter, "half_away") + zero_point
        inside = (v >= QUANT_MIN) & (v <= QUANT_MAX)
        bounded = tl.minimum(tl.maximum(v, QUANT_MIN), QUANT_MAX)
        return inside, tl.where(inside, round_half_away(v) - v, bounded)
    else:
        v = divide_by_scale(x, parameter, "half_away")
        inside = (v >= QUANT_MIN - 0.5) & (v <= QUANT_MAX + 0.5)
        code = tl.minimum(tl.maximum(round_half_away(v), QUANT_MIN), QUANT_MAX)
        return inside, tl.where(inside, code - v, code)


@triton.jit
def learned_share(
    dy_ptr,  # outer × rows × cols, by strides; as are x and dx
    x_ptr,
    dx_ptr,
    parameter,  # broadcasts against a tile, as does zero_point
    zero_point,
    rounds,  # bool scalar: whether the values are rounded at all
    dy_strides,
    x_strides,
    dx_strides,
    start,  # of the share along (outer, rows, cols), as is its end
    end,
    sizes,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    METHOD: tl.constexpr,  # "torch", "megengine", "tqt" or "pact": see learned_terms
    SHIFTS: tl.constexpr,  # whether the zero point has a gradient
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Write dx of a share, and return two float32 (ROWS, COLS) blocks of sums over its tiles.

    dx is dy where the gradient passes, else 0. The first block is ``Σ dy · d y/d parameter``, the second ``Σ dy`` where
    the gradient does not pass (0 without SHIFTS). Where x is NaN, dx is 0, and nothing is summed. :func:`learned_terms`
    says where the gradient passes, and what ``d y/d parameter`` is. If values are not rounded, dx is dy and sums are 0.
    """
    of_parameter = tl.zeros([ROWS, COLS], tl.float32)
    of_shift = tl.zeros([ROWS, COLS], tl.float32)
    for outer in range(start[0], end[0]):
        for row in range(start[1], end[1], ROWS):
            for col in range(start[2], end[2], COLS):
                place, mask = share_tile(outer, row, col, sizes, ROWS, COLS)
                x = tl.load(x_ptr + share_offsets(place, x_strides), mask=mask, other=0).to(tl.float32)
                dy = tl.load(dy_ptr + share_offsets(place, dy_strides), mask=mask, other=0)
                dy = dy.to(tl.float32)
                inside, per_parameter = learned_terms(x, parameter, zero_point, QUANT_MIN, QUANT_MAX, ROUNDING, METHOD)
                counts = mask & (x == x) & rounds
                of_parameter += tl.where(counts, per_parameter * dy, 0.0)
                if SHIFTS:
                    of_shift += tl.where(counts & (inside == 0), dy, 0.0)
                passes = inside | (rounds == 0)
                tl.store(dx_ptr + share_offsets(place, dx_strides), tl.where(passes, dy, 0.0), mask=mask)
    return of_parameter, of_shift


@Launcher
@triton.jit
def learned_backward_kernel(
    dy_ptr,  # outer × rows × cols, by strides
    x_ptr,  # outer × rows × cols, by strides
    dx_ptr,  # outer × rows × cols, by strides; written
    partial_ptr,  # 2 × splits × channels float32, written: the parameter's gradient, Σ dy over clipped values
    parameter_ptr,  # (channels,) float32, or one element
    zero_point_ptr,  # as parameter, int32; None stands for zero
    active_ptr,  # one element, uint8 or bool; 0 copies dy, and makes partial results 0. None counts as 1
    dy_strides,
    x_strides,
    dx_strides,
    sizes,  # (outer, rows, cols)
    share,  # elements that one program reads along each dimension, whole tiles
    split_strides,  # along each dimension: factor of the program's number there; the products' sum numbers its split
    splits,  # how many there are: partial results per channel
    channels,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    METHOD: tl.constexpr,  # "torch", "megengine", "tqt" or "pact": see `tritonq.reference.learned_scale`
    CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write dx of one share, and its partial results of the gradients of parameter and zero point.

    Those of the zero point are sums of dy over clipped values for method ``"torch"`` with a zero point, else 0.
    ``add_partials_kernel`` adds up both, and multiplies the sum for the zero point by ``-scale``.
    """
    start, end, split = share_bounds(sizes, share, split_strides, FIRST, WIDE)
    rounds = True
    if active_ptr is not None:
        rounds = tl.load(active_ptr) != 0

    # A share lies within one tile of channels.
    place = (start[0], start[1] + tl.arange(0, ROWS), start[2] + tl.arange(0, COLS))
    parameter = load_per_channel(parameter_ptr, place, sizes, CHANNEL)
    zero_point = 0
    if zero_point_ptr is not None:
        zero_point = load_per_channel(zero_point_ptr, place, sizes, CHANNEL).to(tl.float32)

    of_parameter, of_shift = learned_share(
        dy_ptr, x_ptr, dx_ptr, parameter, zero_point, rounds, dy_strides, x_strides, dx_strides, start, end, sizes,
        QUANT_MIN, QUANT_MAX, ROUNDING, METHOD, METHOD == "torch" and zero_point_ptr is not None, ROWS, COLS,
    )  # fmt: skip

    channel, valid = share_channels(start, channels, CHANNEL, ROWS, COLS)
    partial_index = split * channels + channel
    tl.store(partial_ptr + partial_index, sum_per_channel(of_parameter, CHANNEL), mask=valid)
    tl.store(partial_ptr + splits * channels + partial_index, sum_per_channel(of_shift, CHANNEL), mask=valid)


@Launcher
@triton.jit
def add_partials_kernel(
    partial_ptr,  # 2 × splits × channels float32: the parameter's gradient, Σ dy over clipped values
    scale_ptr,  # (channels,) float32
    parameter_ptr,  # (channels,) float32, written: gradient of the parameter
    shift_ptr,  # (channels,) float32, written: gradient of the zero point, -scale Σ dy over clipped values
    splits,
    channels,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write gradients of parameter and zero point of CHANNELS channels: partial results, added in a fixed order."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    of_parameter = tl.zeros([SPLITS, CHANNELS], tl.float32)
    of_shift = tl.zeros([SPLITS, CHANNELS], tl.float32)
    for start in range(0, splits, SPLITS):
        part, mask = partial_tile(start, channel, valid, splits, channels, SPLITS)
        of_parameter += tl.load(partial_ptr + part, mask=mask, other=0.0)
        of_shift += tl.load(partial_ptr + splits * channels + part, mask=mask, other=0.0)
    tl.store(parameter_ptr + channel, tl.sum(of_parameter, 0), mask=valid)
    # The scale is loaded here, since the first kernel's loop has no register to spare for it.
    scale = tl.load(scale_ptr + channel, mask=valid, other=0.0)
    tl.store(shift_ptr + channel, -scale * tl.sum(of_shift, 0), mask=valid)


@Launcher
@triton.jit
def clip_then_round_kernel(
    x_ptr,  # outer × rows × cols, by strides
    y_ptr,  # outer × rows × cols, by strides
    scale_ptr,  # (channels,) float32, or one element
    zero_point_ptr,  # as scale, int32; not None
    active_ptr,  # one element, uint8 or bool; 0 copies x. None counts as 1
    x_strides,
    y_strides,
    sizes,
    CHANNEL: tl.constexpr,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write ``(round_half_away(clip(x/s + z)) - z) s`` of one tile: MegEngine's order of clipping and rounding."""
    place = tile_indices(ROWS, COLS, FIRST, WIDE)
    mask = tile_mask(place, sizes, ROWS)
    x = tl.load(x_ptr + tile_offsets(place, x_strides), mask=mask).to(tl.float32)
    scale = load_per_channel(scale_ptr, place, sizes, CHANNEL)
    zero_point = load_per_channel(zero_point_ptr, place, sizes, CHANNEL).to(tl.float32)
    v = divide_by_scale(x, scale, "half_away") + zero_point
    # Comparisons let NaN pass.
    v = tl.where(v < QUANT_MIN, QUANT_MIN, tl.where(v > QUANT_MAX, QUANT_MAX, v))
    y = (round_half_away(v) - zero_point) * scale
    if active_ptr is not None:
        y = tl.where(tl.load(active_ptr) != 0, y, x)
    tl.store(y_ptr + tile_offsets(place, y_strides), y, mask=mask)


def learned_fake_quantize(x: Tensor, grid: Grid, method: str) -> Tensor:
    """Return ``(code - z) · s`` on a grid with a learned parameter, in the dtype of ``x``, with the code by ``method``.

    - ``"torch"``: ``clip(round(x/s) + z)``, rounded as the grid's type rounds.
    - ``"megengine"``: ``round_half_away(clip(x/s + z))``.
    - ``"tqt"``: ``clip(round_half_away(x/s))``.
    - ``"pact"``: ``clip(round(x/s))``, as the grid's type rounds; ``grid.scale`` holds the level ``s · quant_max``.

    The caller's grid rounds half away for ``"megengine"`` and ``"tqt"``, and has no zero point for ``"tqt"`` and
    ``"pact"``. Strides are those of ``torch.empty_like(x)``. While the grid's switch is off, the result is a copy of
    ``x``.
    """
    if method == "megengine" and grid.zero_point is not None:
        return _clip_then_round(x, grid)
    if method == "pact":
        grid = grid.with_scale(grid.scale / grid.qtype.quant_max)
    return fake_quantize(x, grid)


def learned_fake_quantize_backward(dy: Tensor, x: Tensor, grid: Grid, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, of the learned parameter and of the zero point, from ``dy``, that of the result.

    That of ``x`` is ``dy`` where the gradient passes, else 0, in dtype and strides as ``torch.empty_like(x)``; that of
    the parameter is ``Σ dy · d y/d parameter``, both by :func:`learned_terms`; that of the zero point is ``-s Σ dy``
    where the gradient does not pass, for method ``"torch"`` with a zero point (0 for others). Where ``x`` is NaN the
    first is 0, and nothing is summed. While the grid's switch is off, the three are a copy of ``dy``, 0 and 0. The last
    two are float32, shaped as ``grid.scale``; sums are over the values that share a scale.

    ``grid.scale`` is the learned parameter. ``method`` is ``"torch"``, ``"megengine"`` or ``"tqt"``, where that is the
    scale, or ``"pact"``, where it is the clipping level.
    """
    dx = torch.empty_like(x)
    of_parameter, of_shift = (torch.zeros_like(grid.scale, dtype=torch.float32) for _ in range(2))
    if dx.numel() == 0:
        return dx, of_parameter, of_shift
    (dy, x), seen = common_view((dy, x), dx, grid.qtype.axis)
    shares = plan_reduction(x, seen)
    partial = shares.partial(2, x.device)
    parameter, zero_point, enabled = grid_pointers(grid)
    with device_guard(x):
        learned_backward_kernel[shares.grid.programs](
            dy,
            x,
            dx,
            partial,
            parameter,
            zero_point,
            enabled,
            *seen.strides,
            *shares.arguments,
            **grid_constants(grid),
            METHOD=method,
            **shares.constants,
        )
        add_partials_kernel[shares.joining_programs](
            partial,
            parameter,
            of_parameter,
            of_shift,
            shares.splits,
            shares.channels,
            **shares.joining_constants,
        )
    return dx, of_parameter, of_shift


def _clip_then_round(x: Tensor, grid: Grid) -> Tensor:
    """Return ``(round_half_away(clip(x/s + z)) - z) · s``, in MegEngine's order, with s and z of ``grid``.

    It differs from rounding before clipping for ties, if there is a zero point.
    """
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    (x,), seen = common_view((x,), y, grid.qtype.axis)
    tile, launch = plan("fake_quantize", x.dtype, seen, x.device)
    with device_guard(x):
        clip_then_round_kernel[launch.programs](
            x,
            y,
            *grid_pointers(grid),
            *seen.strides,
            seen.sizes,
            QUANT_MIN=grid.qtype.quant_min,
            QUANT_MAX=grid.qtype.quant_max,
            **seen.constants(tile, launch),
        )
    return y
