"""Transposed convolutions as plain ones, for which ONNX Runtime has integer kernels.

Element ``i`` of the input reaches the elements ``i·s + k - p`` of the output, for each place ``k`` of the kernel. With
``k = q·s + r`` the outputs of one phase ``r`` are a plain convolution over the places ``q`` of its kernel. One
convolution computes all phases as channels, ``s·s`` over two axes; DepthToSpace interleaves them, and what padding cuts
off is sliced.
A dilated kernel is one with zeros between its places; with stride 1 the plain convolution is dilated instead. The sums
are the same integers, so the codes are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.deploy.modules import QuantizedLayer, QuantizedTransposed, Quantizer
from tritonq.deploy.onnx_ops import dequantize
from tritonq.deploy.onnx_quantizers import TracedQuantizer, quantize_twice
from tritonq.deploy.phases import Phases, phases_of_kernel, reach
from tritonq.reference.activation import rectify


def phases_of(layer: QuantizedLayer) -> tuple[Phases, ...] | None:
    """Return the phases along each axis of a transposed convolution; None for a layer that is not to be rewritten.

    A layer is not rewritten if one of these holds:

    - it is no transposed convolution, or does not compute in integers with a weight of at most 8 bits;
    - a function such as SiLU stands between it and its quantizer, or it has no quantizer with integer codes and one
      scale;
    - along an axis the padding, less the output padding, is as long as the kernel with its gaps, or longer; or the
      padding is as long as that kernel rounded up to a multiple of the stride.
    """
    output = layer.activation_post_process
    if not isinstance(layer, QuantizedTransposed) or layer.multiplier is None or layer.following is not None:
        return None
    is_quantized = isinstance(output, (Quantizer, TracedQuantizer)) and output.scale.numel() == 1
    if not is_quantized or layer.stored_weight.dtype not in (torch.int8, torch.uint8):
        return None
    return phases_of_kernel(cast(Any, layer))


def rewrite_transposed(layer: QuantizedLayer, phases: tuple[Phases, ...]) -> None:
    """Make a transposed convolution trace to a plain one and to operations that move its results; changed in place.

    Each out channel becomes as many as there are phases: its weight's scale and zero point, its bias and its multiplier
    (scale of the input times scale of the weight) are repeated, and
    the weight gets one plain kernel for each. A copy of the output quantizer becomes the layer's child
    ``first_quantizer`` and rounds the results of the plain convolution. Behind the moves the output quantizer rounds
    them again, which changes no code, so that it need not divide exactly (``exact`` becomes False). ``phases``, one per
    axis, say how the axis is split into plain convolutions (:func:`phases_of`).

    Raises:
        TypeError: the output quantizer is no TracedQuantizer.
    """
    count = math.prod(axis.stride for axis in phases)
    scale = cast(Tensor, layer.weight_scale)
    zero = layer.weight_zero_point
    zero = torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero
    dtype = layer.stored_weight.dtype
    repeated = {
        name: None if tensor is None else tensor.repeat_interleave(count)
        for name, tensor in (("weight_scale", scale), ("bias", layer.stored_bias), ("multiplier", layer.multiplier))
    }
    weight, dilation = layer.stored_weight, cast("tuple[int, ...]", layer.dilation)
    if count > 1:
        weight, dilation = _filled(weight, zero.to(dtype), cast(int, layer.groups), dilation), (1,) * len(phases)
    weight = _plain_weight(weight, zero.to(dtype), cast(int, layer.groups), phases, dilation)
    quantize_twice(layer)
    layer.keep(weight=weight, weight_zero_point=zero.to(dtype).repeat_interleave(count), **repeated)
    layer.forward = partial(_forward, layer, phases, dilation)  # type: ignore[method-assign]


def _zeros(zero: Tensor, groups: int, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return a kernel (in, out / groups, *sizes) in which each code is that of zero.

    ``zero`` is the zero point, one or one per out channel; channels and dtype are those of ``weight``.
    """
    ones = [1] * len(sizes)
    per_out = zero.view(groups, 1, -1, *ones).expand(-1, weight.shape[0] // groups, -1, *sizes)
    return per_out.reshape(weight.shape[0], -1, *sizes).clone()


def _filled(weight: Tensor, zero: Tensor, groups: int, dilation: tuple[int, ...]) -> Tensor:
    """Return ``weight`` with codes of zero between the places of its kernel, so that it needs no ``dilation`` any more.

    ``zero`` is the zero point, one or one per out channel.
    """
    sizes = [reach(size, step) for size, step in zip(weight.shape[2:], dilation, strict=True)]
    whole = _zeros(zero, groups, weight, sizes)
    places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in dilation))
    whole[places] = weight
    return whole


def _plain_weight(
    weight: Tensor, zero: Tensor, groups: int, phases: tuple[Phases, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Return the weight (out · phases, in / groups, *taps) of the plain convolution, with the same codes.

    ``weight`` is that of the transposed one, (in, out / groups, *sizes), ``zero`` its zero point, which stands for
    places beyond the kernel. With ``dilation`` the plain convolution is dilated, too, and there is one phase.
    """
    axes = len(phases)
    taps = [-(-axis.taps // step) for axis, step in zip(phases, dilation, strict=True)]
    strides = [axis.stride for axis in phases]
    # Places beyond the kernel hold the code of zero.
    whole = _zeros(zero, groups, weight, [tap * stride for tap, stride in zip(taps, strides, strict=True)])
    places: tuple[Any, ...] = (..., *map(slice, weight.shape[2:]))
    whole[places] = weight
    inputs = weight.shape[0] // groups
    by_out = whole.view(groups, inputs, -1, *whole.shape[2:]).transpose(1, 2)
    pairs = [size for pair in zip(taps, strides, strict=True) for size in pair]
    split = by_out.reshape(-1, inputs, *pairs)
    # The nearest place comes last, as a plain convolution reads.
    phase_axes, tap_axes = range(3, 2 + 2 * axes, 2), range(2, 2 + 2 * axes, 2)
    plain = split.permute(0, *phase_axes, 1, *tap_axes).flip(tuple(range(-axes, 0)))
    return plain.reshape(-1, inputs, *taps).contiguous()


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def _forward(layer: QuantizedLayer, phases: tuple[Phases, ...], dilation: tuple[int, ...], input: Tensor) -> Tensor:
    weight = dequantize(layer.stored_weight, cast(Tensor, layer.weight_scale), layer.weight_zero_point, 0)
    bias = layer.stored_bias
    bias = None if bias is None else dequantize(bias, cast(Tensor, layer.multiplier), None, 0)
    x, padding = layer.quantized_input(input), tuple(axis.before for axis in phases)
    if padding != tuple(axis.after for axis in phases):
        x = F.pad(x, [side for axis in reversed(phases) for side in (axis.before, axis.after)])
        padding = (0,) * len(phases)
    convolve = _CONVOLUTIONS[len(phases) - 1]
    y = convolve(x, weight, bias, padding=padding, dilation=dilation, groups=cast(int, layer.groups))
    y = cast(Tensor, cast(Any, layer).first_quantizer(rectify(y, layer.ceiling)))
    y = _interleave(y, [axis.stride for axis in phases])
    if any(cut for axis in phases for cut in (axis.first, axis.last)):
        sizes = zip(phases, y.shape[2:], strict=True)
        y = y[(slice(None), slice(None), *(slice(axis.first, size - axis.last) for axis, size in sizes))]
    return cast(Tensor, layer.activation_post_process(y))


def _interleave(y: Tensor, strides: Sequence[int]) -> Tensor:
    """Return ``y`` with its phases, which are channels, put between one another along their axes.

    ``y`` is (n, channels · phases, ...), the result (n, channels, ...) with each size multiplied by its stride: phase
    ``(r, s)`` becomes the elements ``(i·stride + r, j·stride + s)``.
    """
    count, axes = math.prod(strides), len(strides)
    if count == 1:
        return y
    if axes == 2 and strides[0] == strides[1]:
        return F.pixel_shuffle(y, strides[0])
    batch, channels, *sizes = y.shape
    split = y.reshape(batch, channels // count, *strides, *sizes)
    order = [axis for at in range(axes) for axis in (2 + axes + at, 2 + at)]
    whole = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    return split.permute(0, 1, *order).reshape(batch, -1, *whole)
