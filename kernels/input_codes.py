"""A tensor that lies on a grid as codes of one byte, and back, in one pass each.

The byte holds ``round(x / scale) + shift``; the shift moves the middle of the code range to 0, so that codes of 8 bits
fit an int8. Functions here have the names, signatures and results of `tritonq.reference.input_codes`, their
specification. `tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached_launch import Launcher
from .fake_quant import common_view
from .launch_sizes import device_guard, plan
from .pointwise import load_operand
from .quantized import Grid
from .rounding import clamp, round_half_even
from .tile import tile_indices, tile_mask, tile_offsets


class InputCodes(NamedTuple):
    """A tensor as one-byte codes: it is ``(codes - shift) · scale``.

    Attributes:
        codes: int8, shaped and laid out as the tensor.
        scale: one float32.
        shift: one float32 (int32 for an empty tensor), as :func:`shift_of` computes it: it was added to
            ``round(x / scale)`` so that codes fit a byte. None: nothing was added.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None


@triton.jit
def shift_of(zero_point_ptr, MIDDLE: tl.constexpr):
    """Return ``zero_point - MIDDLE`` as a float32 scalar; None stands for the zero point 0.

    Added to ``round(x / scale)``, it gives the byte. MIDDLE is the code that a byte holds as 0.
    """
    shift = 0.0 - MIDDLE
    if zero_point_ptr is not None:
        shift = tl.load(zero_point_ptr).to(tl.float32) - MIDDLE
    return shift


@Launcher
@triton.jit
def encode_kernel(
    x_ptr,  # outer × rows × cols, by strides
    codes_ptr,  # outer × rows × cols int8, by strides
    scale_ptr,  # one float32
    zero_point_ptr,  # one int32; None stands for zero
    scale_out,  # one float32: a copy
    shift_out,  # one float32; None: the shift is 0
    x_strides,
    codes_strides,
    sizes,
    CODE_MIN: tl.constexpr,  # the grid's smallest code less MIDDLE
    CODE_MAX: tl.constexpr,  # the grid's largest code less MIDDLE
    MIDDLE: tl.constexpr,  # the code that a byte holds as 0
    CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write ``round(x / scale) + shift`` of one tile, clamped to CODE_MIN .. CODE_MAX.

    Ties round to even. The first program also writes scale and shift.
    """
    place = tile_indices(ROWS, COLS, FIRST, WIDE)
    mask = tile_mask(place, sizes, ROWS)
    scale = tl.load(scale_ptr)
    shift = shift_of(zero_point_ptr, MIDDLE)
    x = tl.load(x_ptr + tile_offsets(place, x_strides), mask=mask, other=0.0).to(tl.float32)
    # In bfloat16, coarser than the grid at its far end, the nearest step may lie beyond the last one.
    steps = round_half_even(clamp(x * tl.div_rn(1.0, scale), CODE_MIN - shift, CODE_MAX - shift)) + shift
    tl.store(codes_ptr + tile_offsets(place, codes_strides), steps.to(tl.int8), mask=mask)
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        tl.store(scale_out, scale)
        if shift_out is not None:
            tl.store(shift_out, shift)


@Launcher
@triton.jit
def decode_kernel(
    codes_ptr,  # outer × rows × cols int8, by strides
    x_ptr,  # outer × rows × cols, by strides
    scale_ptr,  # one float32
    shift_ptr,  # one float32, or None for zero
    codes_strides,
    x_strides,
    sizes,
    CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write one tile of the tensor ``(code - shift) · scale``."""
    place = tile_indices(ROWS, COLS, FIRST, WIDE)
    mask = tile_mask(place, sizes, ROWS)
    x = load_operand(codes_ptr, tile_offsets(place, codes_strides), mask, 0, scale_ptr, shift_ptr)
    tl.store(x_ptr + tile_offsets(place, x_strides), x, mask=mask)


def encode(x: Tensor, grid: Grid, trusted: bool) -> InputCodes | None:
    """Return ``round(x / scale) + shift``, one-byte codes, with copies of the scale and shift of ``grid``, per tensor.

    ``grid`` has at most 256 codes. With ``trusted`` it is taken for granted that ``x`` lies on the grid. Otherwise the
    codes are decoded and compared with ``x`` (the host waits): if a value differs, as NaN always does, the result is
    None.
    """
    codes, middle = torch.empty_like(x, dtype=torch.int8), middle_of(grid)
    has_shift = grid.zero_point is not None or middle != 0
    if x.numel() == 0:
        zero_point = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
        return InputCodes(codes, grid.scale.clone(), zero_point - middle if has_shift else None)
    scale = torch.empty_like(grid.scale)
    shift = torch.empty_like(scale) if has_shift else None
    (given,), seen = common_view((x,), codes, None)
    tile, launch = plan("fake_quantize", x.dtype, seen, x.device)
    with device_guard(x):
        encode_kernel[launch.programs](
            given,
            codes,
            grid.scale,
            grid.zero_point,
            scale,
            shift,
            *seen.strides,
            seen.sizes,
            CODE_MIN=grid.qtype.quant_min - middle,
            CODE_MAX=grid.qtype.quant_max - middle,
            MIDDLE=middle,
            **seen.constants(tile, launch),
        )
    found = InputCodes(codes, scale, shift)
    return found if trusted or torch.equal(decode(found, x.dtype), x) else None


def decode(codes: InputCodes, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return ``(codes - shift) · scale`` in ``dtype``: the tensor that was given to :func:`encode`.

    ``dtype`` is that tensor's. ``out``, in which the specification computes, is not used: the result is new memory.
    """
    held = codes.codes
    x = torch.empty_like(held, dtype=dtype)
    if x.numel():
        _, seen = common_view((held,), x, None)
        tile, launch = plan("fake_quantize", dtype, seen, x.device)
        with device_guard(x):
            decode_kernel[launch.programs](
                held,
                x,
                codes.scale,
                codes.shift,
                *seen.strides,
                seen.sizes,
                **seen.constants(tile, launch),
            )
    return x


def middle_of(grid: Grid) -> int:
    """Return the code that a byte holds as 0: ``(quant_min + quant_max + 1) // 2``, the middle of the range.

    It is 0 for a grid without zero point whose codes fit int8 as they are.
    """
    smallest, largest = grid.qtype.quant_min, grid.qtype.quant_max
    return 0 if grid.zero_point is None and smallest >= -128 and largest <= 127 else (smallest + largest + 1) // 2
