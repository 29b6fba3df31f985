"""Blocks of small floats with a scale each: one read and one write; the scales are computed in the same pass.

A *block* is a run of elements along one axis that share a scale (MXFP8, NVFP4 and the like). Functions here have the
names, signatures and results of `tritonq.reference.float_blocks`, their specification. `tritonq.kernels` explains the
constants that have no comment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached_launch import Launcher
from .launch_sizes import LaunchPlan, device_guard, parameters, planned, warp_size
from .layout import Tile, View, dense_view, launch_grid, tile_counts, tile_shape, view
from .quantized import BlockFormat, float_constants
from .rounding import round_to_float
from .tile import tile_indices, tile_mask, tile_offsets

# Bits of float32's largest finite number, and of its infinity: what lies above is NaN.
_LARGEST_BITS = tl.constexpr(0x7F7FFFFF)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
# The format of float scales: mantissa bits, exponent of the smallest normal number, and largest number of e4m3.
_SCALE_MANTISSA_BITS, _SCALE_LEAST_EXPONENT, _SCALE_LARGEST = tl.constexpr(3), tl.constexpr(-6), tl.constexpr(448.0)


@Launcher
@triton.jit
def fake_quantize_blocks_kernel(
    x_ptr,  # outer × rows × cols, by strides
    y_ptr,  # outer × rows × cols, by strides
    tensor_scale_ptr,  # one float32, which each block's e4m3 scale is multiplied by; None: scales are powers of two
    active_ptr,  # one element, uint8 or bool; 0 copies x. None counts as 1
    x_strides,
    y_strides,
    sizes,
    CHANNEL: tl.constexpr,  # dimension that the blocks run along: 1 or 2
    SIZE: tl.constexpr,  # elements of a block; divides the tile along CHANNEL
    MANTISSA_BITS: tl.constexpr,  # of the elements' format
    LEAST_EXPONENT: tl.constexpr,  # of its normal numbers
    GREATEST_EXPONENT: tl.constexpr,  # of its largest number
    LARGEST: tl.constexpr,  # its largest finite number
    ROUNDS_UP: tl.constexpr,  # whether power-of-two scales are rounded up, so that no element saturates
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    SAME_STRIDES: tl.constexpr,  # both tensors have x's strides, so that offsets are computed once
):
    """Compute the scales of one tile's blocks, and write the tile as the format's nearest numbers times them.

    A block's scale follows from its largest magnitude a (infinity counts as float32's largest number). Without a tensor
    scale it is ``2^(floor(log2 a) - GREATEST_EXPONENT)``, doubled with ROUNDS_UP if a would saturate, then clamped to
    2^-127 .. 2^(127 - GREATEST_EXPONENT). With a tensor scale t it is ``e4m3(a · (1 / (t · LARGEST))) · t``, where e4m3
    rounds to that format (at most 448), and 0 if this scale or ``t · LARGEST`` is below float32's normal numbers. A
    block with NaN becomes NaN.
    """
    tensor_scale = 1.0
    if tensor_scale_ptr is not None:
        tensor_scale = tl.load(tensor_scale_ptr)
    place = tile_indices(ROWS, COLS, FIRST, WIDE)
    mask = tile_mask(place, sizes, ROWS)
    x_offsets = tile_offsets(place, x_strides)
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0).to(tl.float32)
    blocks = tl.reshape(x, (ROWS // SIZE, SIZE, COLS)) if CHANNEL == 1 else tl.reshape(x, (ROWS, COLS // SIZE, SIZE))
    # Magnitudes are ordered as their bits are, and NaN is the largest of all.
    bits = tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=CHANNEL, keep_dims=True)
    finite_bits = tl.minimum(bits, _LARGEST_BITS)
    if tensor_scale_ptr is None:
        scale, reciprocal = power_of_two_scale(finite_bits, GREATEST_EXPONENT, LARGEST, ROUNDS_UP)
    else:
        scale, reciprocal = float_scale(finite_bits, tensor_scale, LARGEST)
    scale = tl.where(bits > _INFINITY_BITS, float("nan"), scale)
    y = round_to_float(blocks * reciprocal, MANTISSA_BITS, LEAST_EXPONENT, LARGEST) * scale
    if active_ptr is not None:
        y = tl.where(tl.load(active_ptr) != 0, y, blocks)
    y_offsets = x_offsets if SAME_STRIDES else tile_offsets(place, y_strides)
    tl.store(y_ptr + y_offsets, tl.reshape(y, (ROWS, COLS)), mask=mask)


@triton.jit
def power_of_two_scale(bits, GREATEST_EXPONENT: tl.constexpr, LARGEST: tl.constexpr, ROUNDS_UP: tl.constexpr):
    """Return the power-of-two scale of each block, in the range of e8m0, and its reciprocal, as exact float32.

    ``scale = 2^(floor(log2(largest magnitude)) - GREATEST_EXPONENT)``, doubled where ROUNDS_UP asks for it, then
    clamped to 2^-127 .. 2^(127 - GREATEST_EXPONENT); 2^-127 for a block of zeros.

    Args:
        bits: int32, one element per block: the float32 bits of its largest magnitude, which must be finite.
        GREATEST_EXPONENT: exponent of the element format's largest number.
        LARGEST: largest finite number of the element format.
        ROUNDS_UP: whether the scale is doubled if the largest magnitude would saturate.
    """
    code = (bits >> 23) - GREATEST_EXPONENT
    if ROUNDS_UP:
        # The largest magnitude, moved to the exponent of the largest element.
        moved = ((bits & 0x007FFFFF) | ((GREATEST_EXPONENT + 127) << 23)).to(tl.float32, bitcast=True)
        code += (moved > LARGEST).to(tl.int32)
    code = tl.minimum(tl.maximum(code, 0), 254 - GREATEST_EXPONENT)
    # 2^-127, of code 0, is subnormal.
    scale_bits = tl.where(code == 0, 0x00400000, code << 23)
    return scale_bits.to(tl.float32, bitcast=True), ((254 - code) << 23).to(tl.float32, bitcast=True)


@triton.jit
def float_scale(bits, tensor_scale, LARGEST: tl.constexpr):
    """Return each block's scale ``e4m3(a · (1 / (tensor_scale · LARGEST))) · tensor_scale``, and its reciprocal.

    a is the block's largest magnitude, and e4m3 rounds to that format (at most 448). Both results are 0 if the scale or
    ``tensor_scale · LARGEST`` is below float32's normal numbers.

    Args:
        bits: int32, one element per block: the float32 bits of a, which must be finite.
        tensor_scale: float32 scalar that all blocks share.
        LARGEST: largest finite number of the element format, to which the largest magnitude is mapped.
    """
    steps = bits.to(tl.float32, bitcast=True) * reciprocal_or_zero(tensor_scale * LARGEST)
    scale = round_to_float(steps, _SCALE_MANTISSA_BITS, _SCALE_LEAST_EXPONENT, _SCALE_LARGEST) * tensor_scale
    reciprocal = reciprocal_or_zero(scale)
    return tl.where(reciprocal == 0, 0.0, scale), reciprocal


@triton.jit
def reciprocal_or_zero(v):
    """Return ``1 / v``; 0 for ``v`` less than 2^-126, float32's smallest normal number, and for NaN.

    ``v`` is a float32 scalar or block. A negative ``v`` gives 0, too.
    """
    is_usable = v >= _SMALLEST_NORMAL
    return tl.where(is_usable, tl.div_rn(1.0, tl.where(is_usable, v, 1.0)), 0.0)


def fake_quantize_blocks(
    x: Tensor, blocks: BlockFormat, axis: int, tensor_scale: Tensor | None = None, enabled: Tensor | None = None
) -> Tensor:
    """Return ``x`` rounded in blocks along ``axis``, each with a scale of its own; strides as ``torch.empty_like(x)``.

    ``y = number · scale`` with number the element format's nearest to ``x · (1 / scale)``, ties to even, at most its
    largest. With a the largest magnitude of a block (infinity counts as float32's largest number) ``scale =
    2^(floor(log2 a) - e)`` with e the exponent of the format's largest number (doubled if a would saturate and
    ``blocks.scale_rounding`` is ``"ceil"``), or with ``tensor_scale`` ``e4m3(a · (1 / (tensor_scale · largest))) ·
    tensor_scale``, where e4m3 rounds to that format. A block with NaN becomes NaN.

    The exponent of a power of two is clamped to ``-127 .. 127 - e``. With ``tensor_scale``, a scale below float32's
    normal numbers is 0; finite elements of its block become 0, and infinities NaN. A block of zeros stays zeros.

    Args:
        x: float32, float16 or bfloat16, as the result.
        blocks: the format of elements and scales, and the block size.
        axis: that blocks run along; not negative. The last block may be shorter.
        tensor_scale: one float32 on the device, for e4m3 block scales; None: block scales are powers of two.
        enabled: the switch, one element; 0 returns a copy of ``x``, None counts as 1.
    """
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    seen = view(y.shape, (x.stride(), y.stride()), axis)
    if seen is None or seen.channel == 0:
        x = torch.empty_like(y).copy_(x)
        seen = dense_view(y.shape, (y.stride(), y.stride()), axis)
    # An axis of length 1 is none in a view: each element is a block.
    size = 1 if seen.channel is None else blocks.size
    seen = seen._replace(channel=2 if seen.channel is None else seen.channel)
    tile, launch = _plan("fake_quantize_blocks", x.dtype, seen, x.device, size, warp_size(x.device))
    number = float_constants(blocks.element_format)
    with device_guard(x):
        fake_quantize_blocks_kernel[launch.programs](
            x,
            y,
            tensor_scale,
            enabled,
            *seen.strides,
            seen.sizes,
            SIZE=size,
            MANTISSA_BITS=number["MANTISSA_BITS"],
            LEAST_EXPONENT=number["LEAST_EXPONENT"],
            GREATEST_EXPONENT=blocks.element_format.greatest_exponent,
            LARGEST=number["LARGEST"],
            ROUNDS_UP=blocks.scale_rounding == "ceil",
            SAME_STRIDES=seen.same_strides,
            **seen.constants(tile, launch),
        )
    return y


@planned("fake_quantize_blocks")
def _plan(kernel: str, dtype: torch.dtype, seen: View, device: torch.device, size: int, warp_size: int) -> LaunchPlan:
    """Return tile and grid of a launch whose tiles hold whole blocks of ``size`` elements.

    ``kernel`` is the kernel's name in the tables of launch sizes, ``seen`` the view of the tensor.
    """
    chosen = parameters(kernel, dtype, seen, device)
    if seen.channel == 2:
        cols = max(tile_shape(seen.sizes, chosen.elements, chosen.elements)[1], size)
        rows = min(max(chosen.elements // cols, 1), triton.next_power_of_2(seen.sizes[1]))
    else:
        rows = size
        cols = min(max(chosen.elements // size, 1), triton.next_power_of_2(seen.sizes[2]))
    grid = launch_grid(tile_counts(seen.sizes, rows, cols))
    return LaunchPlan(Tile(rows, cols, chosen.num_warps(warp_size)), grid)
