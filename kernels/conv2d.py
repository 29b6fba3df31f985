"""Convolutions as implicit matrix products, with bias, ReLU and fake quantization in the same kernel.

Functions here have the names, signatures and results of `tritonq.reference.conv2d`, their specification, but for the
order of float sums, and for ``tile`` and ``largest_product``. Layers call them for values where this GPU's table says
that they beat torch's convolution (:func:`tuned_tile`), codes also without an entry. Codes are float16 operands with
float32 accumulators: products of codes of up to 9 bits are exact, and so are sums below 2^24 (matrix units round no
addition that needs at most 24 bits: Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021). Sums that may become
larger go on in int32 before they do. `tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from . import launch_sizes
from .activation import load_quantizer, quantize_value
from .cached_launch import Launcher
from .conv_tile import ConvGeometry, ConvTile, conv_tile, empty_output, is_channels_last, output_shape, reach
from .layout import is_wide
from .quantized import Grid, grid_constants, grid_pointers
from .rounding import round_half_away, round_half_even_any

# Below this most of each step is padding, whatever the kernel's size: a class of its own.
_FEW_CHANNELS = 16
# No sum of integers below this is rounded in float32.
_FLOAT32_EXACT = 2**24
# Of two codes of 9 bits.
_LARGEST_PRODUCT = 255 * 255


@triton.jit
def requantize(
    total,  # (pixels, outs) int32, or float32 integers below 2^24; without bias
    bias_ptr,  # (outs,) int32, or None
    multiplier_ptr,  # (outs,) float32
    grid_scale_ptr,  # one float32: scale of the grid that the product is rounded to; None: it is not rounded
    out,  # (outs,) channel numbers
    exists,  # (outs,) which of them there are
    ROUNDING: tl.constexpr,
):
    """Return float32 results of integer sums, (pixels, outs): ``float32(total + bias) · multiplier``.

    With ``grid_scale_ptr`` that product is a number of steps: it is rounded and multiplied by the scale of the grid.
    """
    if bias_ptr is not None:
        # In float32 the sum would be rounded before its only rounding, at 2^24 and above.
        bias = tl.load(bias_ptr + out, mask=exists, other=0).to(tl.int64)
        total = (total.to(tl.int64) + bias[None, :]).to(tl.float32)
    y = total.to(tl.float32) * tl.load(multiplier_ptr + out, mask=exists, other=0.0)[None, :]
    if grid_scale_ptr is not None:
        steps = round_half_even_any(y) if ROUNDING == "half_even" else round_half_away(y)
        y = steps * tl.load(grid_scale_ptr)
    return y


@Launcher
@triton.jit
def conv2d_kernel(
    x_ptr,  # images × (groups · channels) × height × width, by strides
    weight_ptr,  # (groups · outs) × channels × KERNEL of x's dtype, by strides
    bias_ptr,  # (groups · outs,) floats; int32 with multiplier_ptr; or None
    multiplier_ptr,  # (groups · outs,) float32 where x and weight are integer codes; else None
    grid_scale_ptr,  # one float32: scale of the grid that sums are rounded to before the ReLU; None: they are not
    scale_ptr,  # one float32: the output is fake-quantized; None: it is not
    zero_point_ptr,  # one int32; None stands for zero
    active_ptr,  # one element, uint8 or bool; 0 leaves the output unrounded. None counts as 1
    y_ptr,  # images × (groups · outs) × out_height × out_width, by strides
    x_strides,
    weight_strides,
    y_strides,
    channels,  # of a group
    height,  # of an input image
    width,  # of an input image
    outs,  # of a group; all of them where DEPTHWISE
    out_tiles,  # tiles that the outs of a group make
    out_width,  # of an output image
    image_pixels,  # out_height × out_width
    pixels,  # of all images
    STRIDE: tl.constexpr,  # (vertical, horizontal)
    PADDING: tl.constexpr,  # (vertical, horizontal): zeros on each side
    DILATION: tl.constexpr,  # (vertical, horizontal): distance of taps
    KERNEL: tl.constexpr,  # (vertical, horizontal): number of taps
    DEPTHWISE: tl.constexpr,  # one in channel per out channel; then there is no matrix product
    MULTIPLIER: tl.constexpr,  # channels of the output per channel of the input, of a depthwise convolution
    CEILING: tl.constexpr,  # of the ReLU; infinity for a plain one, None without
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    ONTO_ROUNDING: tl.constexpr,  # of ties before the ReLU, with grid_scale_ptr
    PRECISION: tl.constexpr,  # of matrix units: "ieee" or "tf32"
    WIDE: tl.constexpr,  # whether offsets take 64 bits
    FLUSH: tl.constexpr,  # steps of the sum after which codes' sums go on in int32; 0: float32 holds the whole sum
    PIXELS: tl.constexpr,  # size of the tile
    OUTS: tl.constexpr,  # size of the tile
    CHANNELS: tl.constexpr,  # in channels per step of the sum
):
    """Compute PIXELS pixels of one or several images by OUTS out channels of one group: ``FQ(relu?(conv + bias))``.

    With ``multiplier_ptr`` it is ``FQ(relu?((conv + bias) · multiplier))``. ReLU and FQ read values of y's dtype.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    pixel = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)
    group = tl.program_id(1) // out_tiles
    place_out = (tl.program_id(1) - group * out_tiles) * OUTS + tl.arange(0, OUTS)
    exists = place_out < outs
    out = (group * outs + place_out).to(INDEX)
    # Two divisions per pixel of the tile, outside of the loop: small images share a tile.
    image = pixel // image_pixels
    rest = pixel - image * image_pixels
    line = rest // out_width
    column = rest - line * out_width
    first_line = line * STRIDE[0] - PADDING[0]
    first_column = column * STRIDE[1] - PADDING[1]
    corner = image * x_strides[0] + first_line * x_strides[2] + first_column * x_strides[3]
    chunks = 1 if DEPTHWISE else tl.cdiv(channels, CHANNELS)
    steps = KERNEL[0] * KERNEL[1] * chunks
    total = tl.zeros([PIXELS, OUTS], tl.int32 if FLUSH else tl.float32)
    for start in range(0, steps if FLUSH else 1, FLUSH if FLUSH else 1):
        part = tl.zeros([PIXELS, OUTS], tl.float32)
        # One loop over taps and channels, so that loads of the next tap are on their way too.
        for step in range(start, tl.minimum(start + FLUSH, steps) if FLUSH else steps):
            tap = step // chunks
            kernel_line = tap // KERNEL[1]
            kernel_column = tap - kernel_line * KERNEL[1]
            x_row = first_line + kernel_line * DILATION[0]
            x_col = first_column + kernel_column * DILATION[1]
            inside = (pixel < pixels) & (x_row >= 0) & (x_row < height) & (x_col >= 0) & (x_col < width)
            place = corner + (kernel_line * DILATION[0]) * x_strides[2] + (kernel_column * DILATION[1]) * x_strides[3]
            tap_ptr = weight_ptr + kernel_line * weight_strides[2] + kernel_column * weight_strides[3]
            if DEPTHWISE:
                x = tl.load(
                    x_ptr + place[:, None] + (out // MULTIPLIER)[None, :] * x_strides[1],
                    mask=inside[:, None] & exists[None, :],
                    other=0.0,
                )
                weight = tl.load(tap_ptr + out * weight_strides[0], mask=exists, other=0.0)
                part += x.to(tl.float32) * weight.to(tl.float32)[None, :]
            else:
                channel = ((step - tap * chunks) * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)
                x = tl.load(
                    x_ptr + place[:, None] + (group * channels + channel)[None, :] * x_strides[1],
                    mask=inside[:, None] & (channel < channels)[None, :],
                    other=0.0,
                )
                weight = tl.load(
                    tap_ptr + out[None, :] * weight_strides[0] + channel[:, None] * weight_strides[1],
                    mask=exists[None, :] & (channel < channels)[:, None],
                    other=0.0,
                )
                part = tl.dot(x, weight, part, input_precision=PRECISION)
        total += part.to(total.dtype)
    if multiplier_ptr is not None:
        y = requantize(total, bias_ptr, multiplier_ptr, grid_scale_ptr, out, exists, ONTO_ROUNDING)
    else:
        y = total
        if bias_ptr is not None:
            y += tl.load(bias_ptr + out, mask=exists, other=0.0).to(tl.float32)[None, :]
    # The quantizer sees what a convolution of this dtype would have returned.
    y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    scale, zero_point, active = load_quantizer(scale_ptr, zero_point_ptr, active_ptr)
    QUANTIZED: tl.constexpr = scale_ptr is not None
    y = quantize_value(y, scale, zero_point, active, CEILING, QUANTIZED, QUANT_MIN, QUANT_MAX, ROUNDING)
    y_places = image * y_strides[0] + line * y_strides[2] + column * y_strides[3]
    valid = (pixel < pixels)[:, None] & exists[None, :]
    tl.store(y_ptr + y_places[:, None] + out[None, :] * y_strides[1], y.to(y_ptr.dtype.element_ty), mask=valid)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    ceiling: float | None = None,
    grid: Grid | None = None,
    *,
    tile: ConvTile | None = None,
) -> Tensor:
    """Return ``FQ(relu?(conv(x, weight) + bias))``, (n, out, h', w') in the dtype of ``x``; channels_last if ``x`` is.

    ``x`` is (n, c, h, w), ``weight`` (out, c/groups, kh, kw) of its dtype, ``bias`` (out,) or None. Stride, padding
    (zeros on each side) and dilation are (vertical, horizontal). ``ceiling`` is the upper bound of the ReLU, infinity
    for a plain one; None: no ReLU. It reads the sum rounded to the dtype of ``x``. FQ rounds to ``grid``, one scale per
    tensor; None, or switched off: not at all. ``tile`` sets the launch size; None: a default, not the table's entry.
    """
    geometry = ConvGeometry(stride, padding, dilation, groups)
    y = empty_output(x, weight, geometry, x.dtype)
    _launch(x, weight, bias, None, None, y, geometry, ceiling, grid, tile, None)
    return y


def integer_conv2d(
    codes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    onto: Grid | None,
    dtype: torch.dtype,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    ceiling: float | None = None,
    grid: Grid | None = None,
    *,
    tile: ConvTile | None = None,
    largest_product: int = _LARGEST_PRODUCT,
) -> Tensor:
    """Return ``FQ(relu?(v))`` in ``dtype`` with ``v = fl(conv(codes, weight) + bias) · multiplier`` and an exact sum.

    With ``onto``, of scale s, ``multiplier`` gives v in steps of s, and ``round(v) · s``, not clipped, takes its place
    before the ReLU, ties as its type says; fl rounds to float32. ``codes`` and ``weight``, shaped as in
    :func:`conv2d`, are integers minus their zero points in any float dtype, bias int32 and multiplier float32 (out,).
    Stride, padding (zeros) and dilation are (vertical, horizontal), ``ceiling`` the ReLU's bound (None: no ReLU),
    ``grid`` that of FQ (None: no FQ), ``tile`` the launch size (None: a default; a ValueError if sums of one step may
    pass 2^24). The caller ensures that no product of an input's and a weight's code exceeds ``largest_product`` in
    magnitude: the smaller it is, the longer are the sums that float32 adds exactly.
    """
    geometry = ConvGeometry(stride, padding, dilation, groups)
    codes, weight = codes.to(torch.float16), weight.to(torch.float16)
    y = empty_output(codes, weight, geometry, dtype)
    _launch(codes, weight, bias, multiplier, onto, y, geometry, ceiling, grid, tile, _FLOAT32_EXACT // largest_product)
    return y


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    onto: Grid | None,
    y: Tensor,
    geometry: ConvGeometry,
    ceiling: float | None,
    grid: Grid | None,
    tile: ConvTile | None,
    exact_products: int | None,
) -> None:
    """Launch the kernel, which writes ``y``: values convolved as by :func:`conv2d`, codes as by :func:`integer_conv2d`.

    For values ``multiplier``, ``onto`` and ``exact_products`` are None; the latter is how many products of codes
    float32 adds up exactly. An empty ``y`` launches nothing. Grids of float codes: NotImplementedError.
    """
    if y.numel() == 0:
        return
    images, _, height, width = x.shape
    outs, channels, kernel_h, kernel_w = weight.shape
    depthwise = channels == 1 and geometry.groups > 1
    # A copy of little, so that lanes read neighbouring channels of a tap together.
    weight = weight.contiguous(memory_format=torch.channels_last)
    groups = 1 if depthwise else geometry.groups
    pixels = images * y.shape[2] * y.shape[3]
    if tile is None:
        tile = _default_tile(x, pixels, outs // groups, channels, depthwise)
    out_tiles = triton.cdiv(outs // groups, tile.outs)
    flush = _steps_to_flush(exact_products, channels * kernel_h * kernel_w, 1 if depthwise else tile.channels)
    (stride, padding, dilation, _) = geometry
    with launch_sizes.device_guard(x):
        conv2d_kernel[(triton.cdiv(pixels, tile.pixels), groups * out_tiles)](
            x,
            weight,
            None if bias is None else bias.contiguous(),
            None if multiplier is None else multiplier.contiguous(),
            None if onto is None else onto.scale,
            *((None, None, None) if grid is None else grid_pointers(grid)),
            y,
            x.stride(),
            weight.stride(),
            y.stride(),
            channels,
            height,
            width,
            outs // groups,
            out_tiles,
            y.shape[3],
            y.shape[2] * y.shape[3],
            pixels,
            STRIDE=stride,
            PADDING=padding,
            DILATION=dilation,
            KERNEL=(kernel_h, kernel_w),
            DEPTHWISE=depthwise,
            MULTIPLIER=outs // geometry.groups,
            # The ReLU works on values of the output's dtype, and so does its bound.
            CEILING=None if ceiling is None else float(torch.tensor(ceiling, dtype=y.dtype)),
            **grid_constants(grid),
            ONTO_ROUNDING=grid_constants(onto)["ROUNDING"],
            PRECISION=input_precision(x, is_codes=multiplier is not None),
            WIDE=is_wide(max(map(reach, (x, weight, y)))),
            FLUSH=flush,
            PIXELS=tile.pixels,
            OUTS=tile.outs,
            CHANNELS=tile.channels,
            num_warps=tile.warps,
            num_stages=tile.stages,
            # A product and the sum after it would round once where the quantizer rounds twice.
            enable_fp_fusion=False,
        )


def _steps_to_flush(exact_products: int | None, products: int, per_step: int) -> int:
    """Return after how many steps sums of codes move from float32 to int32; 0 if float32 holds all ``products``.

    Each step adds ``per_step`` products, and float32 adds ``exact_products`` exactly; None for values, which never
    move.

    Raises:
        ValueError: float32 does not hold the products of one step.
    """
    if exact_products is None or products <= exact_products:
        return 0
    if per_step > exact_products:
        raise ValueError(f"a step of {per_step} channels has sums of codes that float32 does not hold")
    return exact_products // per_step


def _default_tile(x: Tensor, pixels: int, outs: int, channels: int, depthwise: bool) -> ConvTile:
    """Return the tile of a launch for which no table has a tuned one.

    ``pixels`` are all output pixels, ``outs`` and ``channels`` the out and in channels of one group; ``depthwise``: one
    in channel for each out channel.
    """
    # Without tf32, float32 products are no work for matrix units, and keep their operands in registers.
    widest = 128 if x.element_size() < 4 else 64
    if x.stride(1) == 1:
        return conv_tile(pixels, outs, channels, depthwise=depthwise, widest=widest, steps=(16, 64))
    # Values read one by one need their addresses in registers.
    return conv_tile(pixels, outs, channels, depthwise=depthwise, widest=widest, steps=(16, 32), stages=2)


def input_precision(x: Tensor, is_codes: bool) -> str:
    """Return "tf32" for float32, not codes, on NVIDIA if torch.backends.cudnn.conv.fp32_precision is; else "ieee"."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    if x.dtype != torch.float32 or is_codes or convolutions.fp32_precision != "tf32":
        return "ieee"
    is_hip = driver.active.get_current_target().backend == "hip" if x.is_meta else torch.version.hip is not None
    return "ieee" if is_hip else "tf32"


def tuned_tile(x: Tensor, weight: Tensor, geometry: ConvGeometry, is_codes: bool) -> ConvTile | str | None:
    """Return what `launch_sizes.override` sets around the call, else a convolution's entry in the table of x's GPU.

    A :class:`ConvTile`: the kernel with this tile beats torch's convolution. ``"torch"``: torch's is faster. None:
    there is no entry, or no GPU. ``is_codes``: whether ``x`` and ``weight`` are integer codes.
    """
    index = x.device.index if x.is_cuda else None
    layout = "channels_last" if is_channels_last(x) else "channels_first"
    dtype = "codes" if is_codes else str(x.dtype).removeprefix("torch.")
    tile: ConvTile | str | None = _tuned_tile(dtype, layout, tuple(x.shape), tuple(weight.shape), geometry, index)
    return tile


@launch_sizes.planned("conv2d")
def _tuned_tile(
    dtype: str,
    layout: str,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    geometry: ConvGeometry,
    device_index: int | None,
) -> ConvTile | str | None:
    entry = launch_sizes.tuned("conv2d", table_key(dtype, layout, x, weight, geometry), device_index)
    return None if isinstance(entry, launch_sizes.Parameters) else entry


def table_key(dtype: str, layout: str, x: tuple[int, ...], weight: tuple[int, ...], geometry: ConvGeometry) -> str:
    """Return the class of a convolution, as tables name it: ``"float16/channels_last/3x3s2/dense/large"``.

    The parts are dtype, layout, kernel with stride (``s1x2`` if its numbers differ; a dilation of 2 adds ``d2``, and so
    on), kind and size. The kind is ``depthwise``, ``grouped``, or with one group ``stem`` (fewer than 16 in channels)
    or ``dense``. The size is ``large`` for an output of 2^20 elements or more, else ``small``.

    Args:
        dtype: name of the values' dtype, such as ``"float16"``, or ``"codes"``.
        layout: ``"channels_first"`` or ``"channels_last"``.
        x: shape of the input.
        weight: shape of the weight.
        geometry: stride, padding, dilation, groups.
    """
    stride, _, dilation, groups = geometry
    kernel = f"{weight[2]}x{weight[3]}s{_pair(stride)}" + (f"d{_pair(dilation)}" if dilation != (1, 1) else "")
    kind = "depthwise" if groups > 1 and weight[1] == 1 else "grouped" if groups > 1 else "dense"
    if kind == "dense" and weight[1] < _FEW_CHANNELS:
        kind = "stem"
    elements = math.prod(output_shape(x, weight, geometry))
    return f"{dtype}/{layout}/{kernel}/{kind}/{'large' if elements >= launch_sizes.LARGE else 'small'}"


def _pair(values: tuple[int, ...]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]}x{values[1]}"
