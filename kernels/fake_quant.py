"""Fake quantization: one read and one write forward, two reads and one write backward.

``FQ(x) = (clip(round(x / s) + z) - z) · s`` with the grid's scale s and zero point z, per tensor or per channel, and
the clip to its codes. For float codes it is ``number · s``, with number the float nearest to ``x / s`` that the format
has. Functions here have the names, signatures and results of `tritonq.reference.fake_quant`, their specification.
`tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached_launch import Launcher
from .launch_sizes import device_guard, plan
from .layout import View, dense_view, view
from .quantized import FloatFormat, Grid, float_constants, grid_pointers
from .rounding import divide_by_scale, is_inside, round_to_code, round_to_float, round_to_steps
from .tile import load_per_channel, tile_indices, tile_mask, tile_offsets


@Launcher
@triton.jit
def fake_quantize_kernel(
    x_ptr,  # outer × rows × cols, by strides
    y_ptr,  # outer × rows × cols, by strides; float32 with CODES
    mask_ptr,  # as y, uint8, written: 1 where the gradient passes; None writes no mask
    scale_ptr,  # (channels,) float32, or one element
    zero_point_ptr,  # as scale, int32; None stands for zero
    active_ptr,  # one element, uint8 or bool; 0 copies x. None counts as 1
    x_strides,
    y_strides,
    sizes,
    CHANNEL: tl.constexpr,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,  # of float codes; None: codes are integers
    LEAST_EXPONENT: tl.constexpr,
    LARGEST: tl.constexpr,  # largest finite number of the float format
    OVERFLOW: tl.constexpr,  # number that would follow LARGEST; magnitudes that round to it block the gradient
    CODES: tl.constexpr,  # whether codes are written in place of values
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    SAME_STRIDES: tl.constexpr,  # every tensor has x's strides, so that offsets are computed once
):
    """Fake quantize one tile, or write its codes if CODES; with ``mask_ptr`` also write where the gradient passes."""
    place = tile_indices(ROWS, COLS, FIRST, WIDE)
    mask = tile_mask(place, sizes, ROWS)
    x_offsets = tile_offsets(place, x_strides)
    x = tl.load(x_ptr + x_offsets, mask=mask).to(tl.float32)
    scale = load_per_channel(scale_ptr, place, sizes, CHANNEL)
    zero_point = 0
    if zero_point_ptr is not None:
        zero_point = load_per_channel(zero_point_ptr, place, sizes, CHANNEL).to(tl.float32)
    v = divide_by_scale(x, scale, ROUNDING)
    if MANTISSA_BITS is not None:
        y = round_to_float(v, MANTISSA_BITS, LEAST_EXPONENT, LARGEST)
        if not CODES:
            y = y * scale
    elif CODES:
        y = round_to_code(v, zero_point, QUANT_MIN, QUANT_MAX, ROUNDING)
    else:
        y = round_to_steps(v, zero_point, QUANT_MIN, QUANT_MAX, ROUNDING) * scale
    if active_ptr is not None:
        y = tl.where(tl.load(active_ptr) != 0, y, x)
    y_offsets = x_offsets if SAME_STRIDES else tile_offsets(place, y_strides)
    tl.store(y_ptr + y_offsets, y, mask=mask)
    if mask_ptr is not None:
        if MANTISSA_BITS is not None:
            passes = tl.abs(round_to_float(v, MANTISSA_BITS, LEAST_EXPONENT, OVERFLOW)) < OVERFLOW
        else:
            passes = is_inside(v, zero_point, QUANT_MIN, QUANT_MAX, ROUNDING)
        if active_ptr is not None:
            passes = passes | (tl.load(active_ptr) == 0)
        tl.store(mask_ptr + y_offsets, passes.to(tl.uint8), mask=mask)


@Launcher
@triton.jit
def fake_quantize_backward_kernel(
    dy_ptr,  # outer × rows × cols, by strides
    x_ptr,  # outer × rows × cols, by strides
    dx_ptr,  # outer × rows × cols, by strides
    scale_ptr,  # (channels,) float32, or one element
    zero_point_ptr,  # as scale, int32; None stands for zero
    active_ptr,  # one element, uint8 or bool; 0 copies dy. None counts as 1
    dy_strides,
    x_strides,
    dx_strides,
    sizes,
    CHANNEL: tl.constexpr,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,  # of float codes; None: codes are integers
    LEAST_EXPONENT: tl.constexpr,
    LARGEST: tl.constexpr,  # rounded magnitudes from here on block the gradient; not the format's largest number
    OVERFLOW: tl.constexpr,  # number that would follow the format's largest; larger magnitudes become this one
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    SAME_STRIDES: tl.constexpr,  # every tensor has x's strides, so that offsets are computed once
):
    """Write ``dx`` of one tile: ``dy`` where ``x`` lies in the range of the codes, else 0; 0 at NaN.

    It is computed from ``v = x / scale`` again:

    - integer codes: ``round(v) + zero_point``, not clipped, lies in QUANT_MIN..QUANT_MAX;
    - float codes: the magnitude of v, rounded to the format (at most OVERFLOW), is below LARGEST.

    If the first and the last code block the gradient, too, the launcher gives narrower bounds. While the switch is
    off, ``dx`` is ``dy``.
    """
    place = tile_indices(ROWS, COLS, FIRST, WIDE)
    mask = tile_mask(place, sizes, ROWS)
    x_offsets = tile_offsets(place, x_strides)
    x = tl.load(x_ptr + x_offsets, mask=mask).to(tl.float32)
    dy_offsets = x_offsets if SAME_STRIDES else tile_offsets(place, dy_strides)
    dy = tl.load(dy_ptr + dy_offsets, mask=mask).to(tl.float32)
    scale = load_per_channel(scale_ptr, place, sizes, CHANNEL)
    zero_point = 0
    if zero_point_ptr is not None:
        zero_point = load_per_channel(zero_point_ptr, place, sizes, CHANNEL).to(tl.float32)
    v = divide_by_scale(x, scale, ROUNDING)
    if MANTISSA_BITS is not None:
        passes = tl.abs(round_to_float(v, MANTISSA_BITS, LEAST_EXPONENT, OVERFLOW)) < LARGEST
    else:
        passes = is_inside(v, zero_point, QUANT_MIN, QUANT_MAX, ROUNDING)
    if active_ptr is not None:
        passes = passes | (tl.load(active_ptr) == 0)
    dx_offsets = x_offsets if SAME_STRIDES else tile_offsets(place, dx_strides)
    tl.store(dx_ptr + dx_offsets, tl.where(passes, dy, 0.0), mask=mask)


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Return ``FQ(x)``, in the dtype of ``x``; a copy of ``x`` while the grid's switch is off.

    It is computed in float32. Strides are those of ``torch.empty_like(x)``.
    """
    y = torch.empty_like(x)
    _forward(x, y, grid, codes=False)
    return y


def fake_quantize_with_mask(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return ``FQ(x)`` in the dtype of ``x``, and a bool tensor that is True where the gradient passes.

    The gradient passes where the rounded code, before the clip, is one of the grid's; not at NaN. While the grid's
    switch is off, the first result is a copy of ``x``, and the gradient passes everywhere. Strides of both are those of
    ``torch.empty_like(x)``.
    """
    y, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    _forward(x, y, grid, codes=False, mask=mask)
    return y, mask


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Return ``clip(round(x / s) + z)``, the codes of ``x``, as integer-valued float32; the switch is not read.

    For float codes it is the number of the format, not its bits. NaN stays. Strides are those of
    ``torch.empty_like(x)``.
    """
    codes = torch.empty_like(x, dtype=torch.float32)
    _forward(x, codes, grid, codes=True)
    return codes


def fake_quantize_backward(dy: Tensor, x: Tensor, grid: Grid, blocks_ends: bool = False) -> Tensor:
    """Return the straight-through gradient of :func:`fake_quantize`: ``dy`` where ``x`` lies in range, else 0.

    In range: the rounded code, before the clip, is one of the grid's; NaN is not. With ``blocks_ends`` the smallest and
    the largest code block the gradient, too. While the grid's switch is off, all passes. The result has the dtype and
    strides of ``torch.empty_like(x)``.
    """
    dx = torch.empty_like(x)
    if dx.numel() == 0:
        return dx
    qtype = grid.qtype
    (dy, x), seen = common_view((dy, x), dx, qtype.axis)
    tile, launch = plan("fake_quantize_backward", x.dtype, seen, x.device)
    with device_guard(x):
        fake_quantize_backward_kernel[launch.programs](
            dy,
            x,
            dx,
            *grid_pointers(grid),
            *seen.strides,
            seen.sizes,
            QUANT_MIN=qtype.quant_min + blocks_ends,
            QUANT_MAX=qtype.quant_max - blocks_ends,
            ROUNDING=qtype.rounding,
            **_passing_floats(qtype.float_format, blocks_ends),
            SAME_STRIDES=seen.same_strides,
            **seen.constants(tile, launch),
        )
    return dx


def _forward(x: Tensor, y: Tensor, grid: Grid, codes: bool, mask: Tensor | None = None) -> None:
    """Write the fake-quantized values to ``y``, and ``mask`` if given; with ``codes`` write codes, switch or not."""
    if y.numel() == 0:
        return
    qtype = grid.qtype
    (x,), seen = common_view((x,), y, qtype.axis)
    tile, launch = plan("fake_quantize", x.dtype, seen, x.device)
    scale, zero_point, enabled = grid_pointers(grid)
    with device_guard(x):
        fake_quantize_kernel[launch.programs](
            x,
            y,
            None if mask is None else mask.view(torch.uint8),
            scale,
            zero_point,
            None if codes else enabled,
            *seen.strides,
            seen.sizes,
            QUANT_MIN=qtype.quant_min,
            QUANT_MAX=qtype.quant_max,
            ROUNDING=qtype.rounding,
            **float_constants(qtype.float_format),
            CODES=codes,
            SAME_STRIDES=seen.same_strides,
            **seen.constants(tile, launch),
        )


def _passing_floats(number: FloatFormat | None, blocks_ends: bool) -> dict[str, Any]:
    """Return the constants of a backward to float codes: MANTISSA_BITS, LEAST_EXPONENT, LARGEST and OVERFLOW.

    The gradient is blocked from magnitude LARGEST on: here the number after the largest one, or with ``blocks_ends``
    the largest one itself. All are None for integer codes.

    Args:
        number: the float format of the codes; None: they are integers.
        blocks_ends: whether the first and the last code block the gradient, too.
    """
    constants = float_constants(number)
    if number is not None and not blocks_ends:
        constants["LARGEST"] = number.overflow
    return constants


def common_view(inputs: tuple[Tensor, ...], out: Tensor, axis: int | None) -> tuple[tuple[Tensor, ...], View]:
    """Return the inputs and one view of them and of the dense tensor ``out``, with one stride triple per tensor.

    If the strides allow no view, inputs with other strides than ``out`` are first copied to its strides, in their own
    dtypes; else they are returned as they are. All have one shape, and of ``out`` no element is read. ``axis`` is that
    of the channels; None: there is one scale. The view's stride triples are in the order of the inputs, then ``out``.
    """
    seen = view(out.shape, (*(t.stride() for t in inputs), out.stride()), axis)
    if seen is not None:
        return inputs, seen
    inputs = tuple(t if t.stride() == out.stride() else torch.empty_like(out, dtype=t.dtype).copy_(t) for t in inputs)
    return inputs, dense_view(out.shape, tuple(out.stride() for _ in range(len(inputs) + 1)), axis)
