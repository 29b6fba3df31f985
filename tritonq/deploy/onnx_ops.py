"""Operators that stand for QuantizeLinear and DequantizeLinear while torch.export traces, and their translation.

torch's own exporter translates ``fake_quantize_*`` for three code ranges only, and leaves weights in float. Importing
this file registers ``tritonq::quantize_dequantize``, ``tritonq::dequantize`` and others with torch. The argument
``quantizer`` of some is a name, which the file's tensor of codes gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritonq.granularity import Granularity

# Under this key a graph value says which quantizer's codes it holds.
QUANTIZER_KEY = "tritonq.quantizer"


@torch.library.custom_op("tritonq::quantize_dequantize", mutates_args=())
def quantize_dequantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int,
    divided: bool,
    quantizer: str,
) -> Tensor:
    """Return ``(clamp(round(x / s) + z, quant_min, quant_max) - z) * s``, float32, rounding half to even as ONNX does.

    Args:
        x: float32.
        scale: float32, 0-d or (x.shape[axis],).
        zero_point: int8, uint8, int16 or uint16, as ``scale``; its dtype is that of the codes. float32: the file
            computes with floating-point operators, and both may have as many axes as ``x``, with which they broadcast.
        quant_min: smallest code, in the dtype's range.
        quant_max: largest code.
        axis: axis of ``x`` with the scales, if there are several.
        divided: whether ``x`` holds x / s already, so that the caller decides how the quotient is rounded.
        quantizer: name of the quantizer, for the codes; empty: none.
    """
    scale, zero = _along(scale, x, axis), _along(zero_point.float(), x, axis)
    steps = x if divided else x / scale
    return (steps.round() + zero).clamp(quant_min, quant_max).sub(zero) * scale


@quantize_dequantize.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int,
    divided: bool,
    quantizer: str,
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tritonq::dequantize", mutates_args=())
def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int | None = None
) -> Tensor:
    """Return ``(codes - z) * s`` in float32; the file has a DequantizeLinear.

    Args:
        codes: int8, uint8 or int32, or numbers of a float8 dtype.
        scale: float32 (codes.shape[axis],); with blocks shaped as ``codes``, but with one index per block along
            ``axis``.
        zero_point: shaped as ``scale``, in the dtype of ``codes``; None: zeros.
        axis: axis of ``codes`` with the scales; with blocks the one that is divided into blocks.
        block_size: elements of a block along ``axis``, all blocks alike; None: no blocks. Blocks need opset 21.
    """
    centred = codes.float()
    if zero_point is not None:
        centred = centred - _along(zero_point.float(), codes, axis, block_size)
    return centred * _along(scale, codes, axis, block_size)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int | None = None) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _nearest_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of a float ``dtype`` nearest to ``x``, as float32; larger values saturate."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).float()


@torch.library.custom_op("tritonq::quantize_dequantize_float", mutates_args=())
def quantize_dequantize_float(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quantizer: str) -> Tensor:
    """Return the nearest number of a float format to ``x / s``, times ``s``, float32; larger magnitudes saturate.

    The file has a QuantizeLinear and a DequantizeLinear.

    Args:
        x: float32.
        scale: float32, 0-d or (x.shape[axis],).
        zero_point: zeros, shaped as ``scale``, in the format's dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        axis: axis of ``x`` with the scales; ignored if ``scale`` is 0-d.
        quantizer: name of the quantizer, which here the result of DequantizeLinear gets, not the tensor of codes.
    """
    scale = _along(scale, x, axis)
    return _nearest_float(x / scale, zero_point.dtype) * scale


@quantize_dequantize_float.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quantizer: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tritonq::round_to_float", mutates_args=())
def round_to_float(x: Tensor, one: Tensor, zero_point: Tensor, quantizer: str) -> Tensor:
    """Return ``x`` rounded to the nearest number of a float format, float32; larger magnitudes saturate.

    The file has a Cast and a DequantizeLinear with ``one`` as its scale.

    Args:
        x: float32.
        one: the number 1, float32, 0-d.
        zero_point: zero in the format's dtype: torch.float8_e4m3fn or torch.float8_e5m2, 0-d.
        quantizer: name of the quantizer, which here the result of DequantizeLinear gets, not the tensor of codes.
    """
    return _nearest_float(x, zero_point.dtype) * one


@round_to_float.register_fake
def _(x: Tensor, one: Tensor, zero_point: Tensor, quantizer: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tritonq::global_average", mutates_args=())
def global_average(x: Tensor) -> Tensor:
    """Return the means of ``x`` (n, c, ...) over all axes behind the first two: (n, c, 1, ...).

    An operator of its own, which the file has as GlobalAveragePool.
    """
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@global_average.register_fake
def _(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@torch.library.custom_op("tritonq::negate_codes", mutates_args=())
def negate_codes(x: Tensor, scale: Tensor, negative_scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return ``-x`` for values on a grid; in the file ``x``'s codes are dequantized with the negative scale.

    Args:
        x: float32, on the grid of ``scale`` and ``zero_point``.
        scale: float32, 0-d.
        negative_scale: ``-scale``.
        zero_point: int8 or uint8, 0-d.
    """
    return -x


@negate_codes.register_fake
def _(x: Tensor, scale: Tensor, negative_scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x)


def round_half_away(x: Tensor) -> Tensor:
    """Return the nearest integers to float32 ``x``, ties away from zero, float32, by operators that ONNX has."""
    size = x.abs()
    whole = size.floor()
    return (whole + (size - whole >= 0.5).float()) * x.sign()


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return a ``custom_translation_table`` for ``torch.onnx.export``: this file's operators to their translations.

    A translation is a function that takes the operator's arguments and adds ONNX nodes.

    Raises:
        ImportError: onnxscript is not installed.
    """
    from onnxscript import opset18 as op
    from onnxscript import opset19 as op19
    from onnxscript import opset21 as op21

    def bound(value: int, limit: int, dtype: Any) -> Any:
        return None if value == limit else op.Constant(value=_scalar(value, dtype))

    def translate_quantize_dequantize(
        x: Any,
        scale: Any,
        zero_point: Any,
        quant_min: int,
        quant_max: int,
        axis: int,
        divided: bool,
        quantizer: str,
    ) -> Any:
        dtype = zero_point.dtype.numpy()
        if dtype.kind == "f":
            bounds = (op.Constant(value_float=float(value)) for value in (quant_min, quant_max))
            steps = op.Round(x if divided else op.Div(x, scale))
            codes = op.Clip(op.Add(steps, zero_point), *bounds)
            codes.metadata_props[QUANTIZER_KEY] = quantizer
            return op.Mul(op.Sub(codes, zero_point), scale)
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        step = op.Constant(value_float=1.0) if divided else scale
        codes = op.QuantizeLinear(x, step, zero_point, axis=axis)
        if (quant_min, quant_max) != (low, high):
            # On codes, not before QuantizeLinear: ONNX Runtime still sees a convolution that feeds a quantizer.
            codes = op.Clip(codes, bound(quant_min, low, dtype), bound(quant_max, high, dtype))
        if quantizer:
            codes.metadata_props[QUANTIZER_KEY] = quantizer
        return op.DequantizeLinear(codes, scale, zero_point, axis=axis)

    def translate_dequantize(codes: Any, scale: Any, zero_point: Any, axis: int, block_size: int | None = None) -> Any:
        blocks = {} if block_size is None else {"block_size": block_size}
        return (op if block_size is None else op21).DequantizeLinear(codes, scale, zero_point, axis=axis, **blocks)

    def translate_quantize_dequantize_float(x: Any, scale: Any, zero_point: Any, axis: int, quantizer: str) -> Any:
        codes = op19.QuantizeLinear(x, scale, zero_point, axis=axis)
        values = op19.DequantizeLinear(codes, scale, zero_point, axis=axis)
        values.metadata_props[QUANTIZER_KEY] = quantizer
        return values

    def translate_round_to_float(x: Any, one: Any, zero_point: Any, quantizer: str) -> Any:
        # Cast saturates and rounds as QuantizeLinear does.
        numbers = op19.DequantizeLinear(op19.Cast(x, to=zero_point.dtype.value, saturate=1), one, zero_point, axis=0)
        numbers.metadata_props[QUANTIZER_KEY] = quantizer
        return numbers

    def translate_global_average(x: Any) -> Any:
        return op.GlobalAveragePool(x)

    def translate_negate_codes(x: Any, scale: Any, negative_scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), negative_scale, zero_point)

    table: Any = torch.ops.tritonq
    return {
        table.negate_codes.default: translate_negate_codes,
        table.quantize_dequantize_float.default: translate_quantize_dequantize_float,
        table.round_to_float.default: translate_round_to_float,
        table.global_average.default: translate_global_average,
        table.quantize_dequantize.default: translate_quantize_dequantize,
        table.dequantize.default: translate_dequantize,
    }


def _scalar(value: int, dtype: Any) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(dtype.type(value).reshape(()))


def _along(values: Tensor, x: Tensor, axis: int, block_size: int | None = None) -> Tensor:
    if block_size is not None:
        return values.repeat_interleave(block_size, axis)
    return values if values.dim() in (0, x.dim()) else Granularity(axis).align(values, x.dim())
