"""Convolutions of 8-bit codes as implicit matrix products: int8 dot, int32 accumulators, requantization by shifting.

The function here has the name, signature and results of `tritonq.reference.int8_conv`, its specification.
`tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached_launch import Launcher
from .conv_tile import ConvGeometry, conv_tile, empty_output, reach
from .launch_sizes import device_guard
from .layout import is_wide

ACCUMULATOR_MAX = tl.constexpr(2**31 - 1)
# Far outside of every 8-bit range, and yet 32 bits hold it shifted left by any fractional length.
_BEYOND_CODES = tl.constexpr(2**14)
# CUDA's and HIP's limit on the third grid axis, which images lie on.
_MAX_IMAGES = 65535


@triton.jit
def shift_to_codes(total, shift, QUANT_MIN: tl.constexpr, QUANT_MAX: tl.constexpr):
    """Return ``clamp(round_half_even(total · 2^-shift), QUANT_MIN, QUANT_MAX)`` in integer arithmetic.

    Args:
        total: int32 or int64 accumulators; the result has their dtype.
        shift: of the same dtype, broadcasts against ``total``; -16..30 (-16..62 for int64), which is not checked.
        QUANT_MIN: smallest code, at least -2^14.
        QUANT_MAX: largest code, at most 2^14.
    """
    right = tl.maximum(shift, 0)
    left = tl.maximum(-shift, 0)
    code = total >> right
    rest = total - (code << right)
    half = ((right * 0 + 1) << right) >> 1
    up = (rest > half) | ((rest == half) & (right > 0) & ((code & 1) == 1))
    code = code + up.to(code.dtype)
    code = tl.minimum(tl.maximum(code, -_BEYOND_CODES), _BEYOND_CODES) << left
    return tl.minimum(tl.maximum(code, QUANT_MIN), QUANT_MAX)


@triton.jit
def finish(
    total,  # (pixels, outs) int32 or int64, without bias
    bias,  # (outs,) of total's dtype
    shift_ptr,  # (outs,) int32: result = sum · 2^-shift; None: the result is the sums
    saturated_ptr,  # one int64, grows by the number of clamped sums; None: no sum needs clamping
    out,  # (outs,) channel numbers
    outs,  # number of out channels
    valid,  # (pixels, outs) which elements exist
    QUANT_MIN: tl.constexpr,  # smallest code of the result, used with shift_ptr
    QUANT_MAX: tl.constexpr,  # largest code of the result
):
    """Add the bias to integer sums, clamp them to ±(2^31 - 1), and return them as codes.

    Clamped sums are counted in ``saturated_ptr``; without it sums are not clamped. Codes are those of
    :func:`shift_to_codes`; without ``shift_ptr`` the result is the sums. Both have the dtype of ``total``.
    """
    total = total + bias[None, :]
    if saturated_ptr is not None:
        over = (tl.abs(total) > ACCUMULATOR_MAX) & valid
        count = tl.sum(over.to(tl.int64))
        # An integer sum is the same in any order; the usual one is zero, and then no memory is touched.
        tl.atomic_add(saturated_ptr, count, mask=count > 0)
        total = tl.minimum(tl.maximum(total, -ACCUMULATOR_MAX), ACCUMULATOR_MAX)
    if shift_ptr is None:
        return total
    else:
        shift = tl.load(shift_ptr + out, mask=out < outs, other=0).to(total.dtype)
        return shift_to_codes(total, shift[None, :], QUANT_MIN, QUANT_MAX)


@Launcher
@triton.jit
def int8_conv_kernel(
    x_ptr,  # images × channels × height × width codes, by strides
    weight_ptr,  # outs × channels × KERNEL int8, by strides
    bias_ptr,  # (outs,) int32, int64 with saturated_ptr; bias + 128 Σ weight with UNSIGNED, unless DEPTHWISE
    shift_ptr,  # (outs,) int32, or None for accumulators
    y_ptr,  # images × outs × out_height × out_width, by strides
    saturated_ptr,  # one int64, grows by the number of clamped sums; None where no sum can pass 32 bits
    x_strides,
    weight_strides,
    y_strides,
    channels,
    height,  # of an input image
    width,  # of an input image
    outs,  # out channels
    out_width,  # of an output image
    pixels,  # out_height × out_width
    STRIDE: tl.constexpr,  # (vertical, horizontal)
    PADDING: tl.constexpr,  # (vertical, horizontal): zeros on each side
    DILATION: tl.constexpr,  # (vertical, horizontal): distance of taps
    KERNEL: tl.constexpr,  # (vertical, horizontal): number of taps
    DEPTHWISE: tl.constexpr,  # one in channel per out channel; then there is no matrix product
    MULTIPLIER: tl.constexpr,  # out channels per in channel, of a depthwise convolution
    UNSIGNED: tl.constexpr,  # whether x is uint8; it is read minus 128, unless DEPTHWISE
    WIDE: tl.constexpr,  # whether offsets take 64 bits
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    PIXELS: tl.constexpr,  # size of the tile
    OUTS: tl.constexpr,  # size of the tile
    CHANNELS: tl.constexpr,  # in channels per step of the sum
):
    """Compute PIXELS pixels of one image by OUTS out channels: ``acc = Σ x · weight + bias``, clamped to ±(2^31 - 1).

    With ``shift_ptr`` write ``clamp(round_half_even(acc · 2^-shift), QUANT_MIN, QUANT_MAX)`` in place of acc. Without
    ``saturated_ptr`` acc is not clamped.
    """
    image = tl.program_id(2).to(tl.int64)
    x_ptr += image * x_strides[0]
    y_ptr += image * y_strides[0]
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    pixel = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)
    out = tl.program_id(1).to(INDEX) * OUTS + tl.arange(0, OUTS)
    # One division per pixel of the tile, outside of the loops.
    line = pixel // out_width
    column = pixel - line * out_width
    SUM: tl.constexpr = tl.int32 if saturated_ptr is None else tl.int64
    total = tl.zeros([PIXELS, OUTS], SUM)
    for kernel_line in range(KERNEL[0]):
        x_row = line * STRIDE[0] + kernel_line * DILATION[0] - PADDING[0]
        for kernel_column in range(KERNEL[1]):
            x_col = column * STRIDE[1] + kernel_column * DILATION[1] - PADDING[1]
            inside = (pixel < pixels) & (x_row >= 0) & (x_row < height) & (x_col >= 0) & (x_col < width)
            place = x_row * x_strides[2] + x_col * x_strides[3]
            tap = weight_ptr + kernel_line * weight_strides[2] + kernel_column * weight_strides[3]
            if DEPTHWISE:
                codes = tl.load(
                    x_ptr + place[:, None] + (out // MULTIPLIER)[None, :] * x_strides[1],
                    mask=inside[:, None] & (out < outs)[None, :],
                    other=0,
                )
                weight = tl.load(tap + out * weight_strides[0], mask=out < outs, other=0)
                total += codes.to(SUM) * weight.to(SUM)[None, :]
            else:
                for first in range(0, channels, CHANNELS):
                    channel = (first + tl.arange(0, CHANNELS)).to(INDEX)
                    codes = tl.load(
                        x_ptr + place[:, None] + channel[None, :] * x_strides[1],
                        mask=inside[:, None] & (channel < channels)[None, :],
                        other=0,
                    )
                    if UNSIGNED:
                        # The matrix units multiply signed bytes: code - 128, for which the bias makes up.
                        codes = (codes.to(tl.int16) - 128).to(tl.int8)
                    weight = tl.load(
                        tap + out[None, :] * weight_strides[0] + channel[:, None] * weight_strides[1],
                        mask=(out < outs)[None, :] & (channel < channels)[:, None],
                        other=0,
                    )
                    total += tl.dot(codes, weight, out_dtype=tl.int32).to(SUM)
    bias = tl.load(bias_ptr + out, mask=out < outs, other=0)
    valid = (pixel < pixels)[:, None] & (out < outs)[None, :]
    result = finish(total, bias, shift_ptr, saturated_ptr, out, outs, valid, QUANT_MIN, QUANT_MAX)
    y = y_ptr + (line * y_strides[2] + column * y_strides[3])[:, None] + out[None, :] * y_strides[1]
    tl.store(y, result.to(y_ptr.dtype.element_ty), mask=valid)


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    quant_min: int,
    quant_max: int,
    out_dtype: torch.dtype,
    saturated: Tensor | None = None,
) -> Tensor:
    """Return ``acc = Σ x · weight + bias``, or with ``shift`` its codes ``clamp(round_half_even(acc · 2^-shift))``.

    All arithmetic is on integers. The result is (n, out, h', w') of ``out_dtype``; channels_last if ``x`` is.

    Args:
        x: int8 or uint8 codes (n, c, h, w).
        weight: int8 codes (out, c/groups, kh, kw).
        bias: int32 (out,), in units of the sums.
        shift: int32 (out,), -8..16; a negative one multiplies. None returns the accumulators.
        stride: (vertical, horizontal), as are padding and dilation.
        padding: codes 0 on each side.
        dilation: distance of taps, 1 for neighbours.
        groups: 1, or c (depthwise).
        quant_min: smallest code of the result; not used without ``shift``, as ``quant_max``.
        quant_max: largest code of the result.
        out_dtype: int8, uint8, or int32 for accumulators.
        saturated: int64 (1,), to which the number of accumulators that were clamped to ±(2^31 - 1) is added. None: the
            caller knows that no sum passes 32 bits.
    """
    _, channels, height, width = x.shape
    outs, _, kernel_h, kernel_w = weight.shape
    y = empty_output(x, weight, ConvGeometry(stride, padding, dilation, groups), out_dtype)
    out_h, out_w = y.shape[2:]
    if y.numel() == 0:
        return y
    depthwise = groups > 1
    unsigned = x.dtype == torch.uint8
    wide = torch.int32 if saturated is None else torch.int64
    start = bias.to(wide)
    if unsigned and not depthwise:
        start = start + 128 * weight.sum((1, 2, 3), dtype=wide)
    # Accumulators of 64 bits are two registers each.
    widest = 128 if saturated is None else 64
    tile = conv_tile(out_h * out_w, outs, channels, depthwise=depthwise, widest=widest)
    shift = None if shift is None else shift.contiguous()
    with device_guard(x):
        for images, results in zip(x.split(_MAX_IMAGES), y.split(_MAX_IMAGES), strict=True):
            int8_conv_kernel[triton.cdiv(out_h * out_w, tile.pixels), triton.cdiv(outs, tile.outs), len(images)](
                images,
                weight,
                start,
                shift,
                results,
                saturated,
                x.stride(),
                weight.stride(),
                y.stride(),
                channels,
                height,
                width,
                outs,
                out_w,
                out_h * out_w,
                STRIDE=stride,
                PADDING=padding,
                DILATION=dilation,
                KERNEL=(kernel_h, kernel_w),
                DEPTHWISE=depthwise,
                MULTIPLIER=outs // channels if depthwise else 1,
                UNSIGNED=unsigned,
                # Where an image starts is computed in 64 bits anyway.
                WIDE=is_wide(max(reach(x[:1]), reach(y[:1]), reach(weight))),
                QUANT_MIN=quant_min,
                QUANT_MAX=quant_max,
                PIXELS=tile.pixels,
                OUTS=tile.outs,
                CHANNELS=tile.channels,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
    return y
