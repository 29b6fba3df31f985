"""What TensorRT's integers can hold, and float arithmetic for everything else.

TensorRT takes signed 8-bit codes with a zero point of 0, in activations and in weights. A quantizer with another grid
is written as float operators that give the trained values, and a layer that reads such a grid as a float layer.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from tritonq.deploy.modules import QuantizedLayer, QuantizedTransposed, Quantizer
from tritonq.deploy.onnx_quantizers import TracedQuantizer, float_quantizer
from tritonq.quantized_type import QuantizedType

_REMEDY = 'train with get_qconfig("tensorrt")'
_LOW, _HIGH = -128, 127


def int8_quantizer(source: Quantizer, name: str) -> TracedQuantizer:
    """Return a traced quantizer with int8 codes; one of float arithmetic if TensorRT's can't hold the trained codes.

    They must lie in -128..127 with a zero point of 0, on one grid for the tensor: TensorRT takes scales per channel for
    weights alone. A narrower range becomes a clamp before QuantizeLinear.

    Args:
        source: the converted model's quantizer.
        name: its name in the model.
    """
    low, high = source.qtype.quant_min, source.qtype.quant_max
    if source.qtype.axis is not None or not _fits(source.qtype, source.zero_point):
        return float_quantizer(source, name)
    traced = TracedQuantizer(source, name, source.zero_point.to(torch.int8), _LOW, _HIGH)
    if (low, high) != (_LOW, _HIGH):
        scale = float(source.scale)
        traced.clamp = (low * scale, high * scale)
    return traced


def runs_in_float(layer: QuantizedLayer) -> bool:
    """Whether TensorRT will run a layer in float although its weight was quantized; False if the weight is float.

    It does if its integers (signed 8 bits, zero point 0) can't hold the codes of weight or input, if the weight has
    scales per group, or if a transposed convolution has different scales per out channel. Weight codes of a float
    format count as codes that it can hold. If the grid of the input is not known, only the weight is judged.
    """
    if layer.weight_scale is None:
        return False
    if layer.has_groups:
        return True
    if isinstance(layer, QuantizedTransposed) and bool((layer.weight_scale != layer.weight_scale[0]).any()):
        return True
    weight_fits = layer.weight_zero_point is None and layer.stored_weight.dtype == torch.int8
    if layer.types.input is None or layer.input_zero_point is None:
        return not weight_fits
    return not (weight_fits and _fits(layer.types.input, layer.input_zero_point))


def tell_float_layers(model: nn.Module) -> None:
    """Warn (UserWarning) of a converted model's layers for which :func:`runs_in_float` is true, with their names.

    Nothing happens if there are none.
    """
    names = [
        name for name, module in model.named_modules() if isinstance(module, QuantizedLayer) and runs_in_float(module)
    ]
    if names:
        warnings.warn(
            f"TensorRT takes int8 codes with zero points of 0 alone, and one scale for all channels of a transposed "
            f"convolution's weight; it will run in float: {', '.join(names)}. For integers {_REMEDY}",
            stacklevel=4,
        )


def _fits(grid: QuantizedType, zero_point: torch.Tensor) -> bool:
    return grid.quant_min >= _LOW and grid.quant_max <= _HIGH and not bool(zero_point.any())
