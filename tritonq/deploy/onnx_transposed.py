"""Transposed convolutions as plain ones, for which ONNX Runtime has integer kernels.

With stride ``s`` and padding ``p``, element ``i`` of the input contributes to the elements ``i·s + k - p`` of the
output, for each place ``k`` of the kernel. Write ``k = q·s + r``: the outputs with one *phase* ``r`` are a plain
convolution over the places ``q`` of its kernel. One convolution computes all ``s·s`` phases as channels; DepthToSpace
interleaves them, and what the padding cuts off is sliced away. A dilated kernel is one with zeros between its places;
with stride 1 the plain convolution is dilated instead. The sums are the same integers, so the codes are.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.deploy.modules import QuantizedConvTranspose2d, QuantizedLayer, Quantizer
from tritonq.deploy.onnx_ops import dequantize
from tritonq.deploy.onnx_quantizers import TracedQuantizer, quantize_twice
from tritonq.deploy.phases import Phases, phases_of_kernel, reach
from tritonq.reference.activation import rectify


def phases_of(layer: QuantizedLayer) -> tuple[Phases, Phases] | None:
    """Return the phases of a layer along height and width; None if it is written as a transposed convolution.

    That is so if it does not compute in integers, if its padding is larger than the kernel, and if no quantizer with
    one grid follows.
    """
    output = layer.activation_post_process
    if not isinstance(layer, QuantizedConvTranspose2d) or layer.multiplier is None or layer.following is not None:
        return None
    is_quantized = isinstance(output, (Quantizer, TracedQuantizer)) and output.scale.numel() == 1
    if not is_quantized or layer.stored_weight.dtype not in (torch.int8, torch.uint8):
        return None
    return phases_of_kernel(layer)


def _dilation(layer: QuantizedLayer) -> tuple[int, int]:
    return cast("tuple[int, int]", layer.dilation)


def rewrite_transposed(layer: QuantizedLayer, phases: tuple[Phases, Phases]) -> None:
    """Make a transposed convolution trace to a plain one, followed by operations that interleave and slice its results.

    Args:
        layer: changed in place.
        phases: the result of :func:`phases_of`.
    """
    count = phases[0].stride * phases[1].stride
    scale = cast(Tensor, layer.weight_scale)
    zero = layer.weight_zero_point
    zero = torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero
    dtype = layer.stored_weight.dtype
    repeated = {
        name: None if tensor is None else tensor.repeat_interleave(count)
        for name, tensor in (("weight_scale", scale), ("bias", layer.stored_bias), ("multiplier", layer.multiplier))
    }
    weight, dilation = layer.stored_weight, _dilation(layer)
    if count > 1:
        weight, dilation = _filled(weight, zero.to(dtype), cast(int, layer.groups), dilation), (1, 1)
    weight = _plain_weight(weight, zero.to(dtype), cast(int, layer.groups), phases, dilation)
    quantize_twice(layer)
    layer.keep(weight=weight, weight_zero_point=zero.to(dtype).repeat_interleave(count), **repeated)
    layer.forward = partial(_forward, layer, phases, dilation)  # type: ignore[method-assign]


def _zeros(zero: Tensor, groups: int, weight: Tensor, height: int, width: int) -> Tensor:
    """Return weight codes of zero, (in, out / groups, height, width), for a kernel of that size."""
    per_out = zero.view(groups, 1, -1, 1, 1).expand(-1, weight.shape[0] // groups, -1, height, width)
    return per_out.reshape(weight.shape[0], -1, height, width).clone()


def _filled(weight: Tensor, zero: Tensor, groups: int, dilation: tuple[int, int]) -> Tensor:
    """Return the kernel of a dilated convolution with codes of zero between its places."""
    sizes = [reach(size, step) for size, step in zip(weight.shape[2:], dilation, strict=True)]
    whole = _zeros(zero, groups, weight, *sizes)
    whole[..., :: dilation[0], :: dilation[1]] = weight
    return whole


def _plain_weight(
    weight: Tensor, zero: Tensor, groups: int, phases: tuple[Phases, Phases], dilation: tuple[int, int]
) -> Tensor:
    """Return the weight of the plain convolution, (out · phases, in / groups, taps, taps).

    ``weight`` is (in, out / groups, height, width). With ``dilation`` the plain convolution is dilated, too, and there
    is one phase.
    """
    height, width = phases
    taps = [-(-axis.taps // step) for axis, step in zip(phases, dilation, strict=True)]
    # Places beyond the kernel hold the code of zero.
    whole = _zeros(zero, groups, weight, taps[0] * height.stride, taps[1] * width.stride)
    whole[..., : weight.shape[2], : weight.shape[3]] = weight
    inputs = weight.shape[0] // groups
    by_out = whole.view(groups, inputs, -1, *whole.shape[2:]).transpose(1, 2)
    split = by_out.reshape(-1, inputs, taps[0], height.stride, taps[1], width.stride)
    # The nearest place comes last, as a plain convolution reads.
    plain = split.permute(0, 3, 5, 1, 2, 4).flip(4, 5)
    return plain.reshape(-1, inputs, *taps).contiguous()


def _forward(layer: QuantizedLayer, phases: tuple[Phases, Phases], dilation: tuple[int, int], input: Tensor) -> Tensor:
    height, width = phases
    weight = dequantize(layer.stored_weight, cast(Tensor, layer.weight_scale), layer.weight_zero_point, 0)
    bias = layer.stored_bias
    bias = None if bias is None else dequantize(bias, cast(Tensor, layer.multiplier), None, 0)
    x, padding = layer.quantized_input(input), (height.before, width.before)
    if padding != (height.after, width.after):
        x, padding = F.pad(x, (width.before, width.after, height.before, height.after)), (0, 0)
    y = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=cast(int, layer.groups))
    y = cast(Tensor, cast(Any, layer).first_quantizer(rectify(y, layer.ceiling)))
    y = _interleave(y, height.stride, width.stride)
    if any(cut for axis in phases for cut in (axis.first, axis.last)):
        y = y[:, :, height.first : y.shape[2] - height.last, width.first : y.shape[3] - width.last]
    return cast(Tensor, layer.activation_post_process(y))


def _interleave(y: Tensor, height: int, width: int) -> Tensor:
    if height == width:
        return y if height == 1 else F.pixel_shuffle(y, height)
    batch, channels, rows, columns = y.shape
    split = y.reshape(batch, channels // (height * width), height, width, rows, columns)
    return split.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, rows * height, columns * width)
