"""Convolutions of an ONNX file whose results stay float values: written so that their sums are exact.

ONNX Runtime runs ``DequantizeLinear → Conv → QuantizeLinear`` as an integer convolution. Where something else follows,
such as the addition of a residual branch, it would add float products, in an order of its own. There the convolution
is written in integers: ``float(ConvInteger(codes, weight) + bias) * multiplier``, which is how eval mode and the
converted model compute it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tritonq.deploy.onnx_moves import constant_of

# ONNX Runtime's ConvInteger is several times as fast for unsigned weights as for signed ones.
_WEIGHT_OFFSET = 128


def write_exact_sums(graph: Any) -> None:
    """Write convolutions of codes by ConvInteger, except those whose result only QuantizeLinear reads.

    Weights are written as uint8, 128 larger, with the zero point 128.

    A convolution is written so if its input has uint8 codes with one scale, its weight is a constant of int8 codes with
    zero points of 0, and its bias, if it has one, a constant of codes. Any other is left as it is.

    Args:
        graph: an ``onnx_ir.Graph``; changed in place.
    """
    for node in list(graph):
        if node.op_type == "Conv" and not _is_quantized_at_once(node.outputs[0]):
            parts = _integers_of(node)
            if parts is not None:
                _replace(graph, node, *parts)


def _is_quantized_at_once(result: Any) -> bool:
    readers = {reader.op_type for reader, _ in result.uses()}
    return readers == {"QuantizeLinear"} and not result.is_graph_output()


def _integers_of(node: Any) -> tuple[Any, Any, Any] | None:
    """Return the DequantizeLinear nodes ``(source, weight, bias)`` of a convolution's input, weight and bias.

    The last is None without a bias. The result is None if one of the three is in float, or not in codes that
    ConvInteger takes: uint8 with one scale for the input, constant int8 with zero points of 0 for the weight.
    """
    import onnx_ir as ir

    makers = [value.producer() for value in node.inputs if value is not None]
    if any(maker is None or maker.op_type != "DequantizeLinear" for maker in makers):
        return None
    source, weight, bias = (*makers, None)[:3]
    if source.inputs[0].dtype != ir.DataType.UINT8 or any(_numbers(value).ndim for value in source.inputs[1:]):
        return None
    codes, scale = constant_of(weight.inputs[0]), constant_of(weight.inputs[1])
    if codes is None or codes.dtype != np.int8 or scale is None or any(_numbers(v).any() for v in weight.inputs[2:]):
        return None
    if bias is not None and (constant_of(bias.inputs[0]) is None or constant_of(bias.inputs[1]) is None):
        return None
    return source, weight, bias


def _numbers(value: Any) -> Any:
    """Return the numbers of a constant as an array; NaN if ``value`` is no constant, 0 if it is None (left out)."""
    if value is None:
        return np.zeros(())
    found = constant_of(value)
    return np.full(1, np.nan) if found is None else found


def _replace(graph: Any, node: Any, source: Any, weight: Any, bias: Any) -> None:
    import onnx_ir as ir
    from onnx_ir.convenience import replace_nodes_and_values

    result, name = node.outputs[0], weight.inputs[0].name.removesuffix(".weight")
    codes = constant_of(weight.inputs[0])
    along_channels = (-1, *[1] * (codes.ndim - 2))

    def initializer(suffix: str, numbers: Any) -> Any:
        """Return a constant; one for equal numbers, since a weight may be convolved with inputs of several scales."""
        named, calls = f"{name}.{suffix}", 1
        while named in graph.initializers:
            if np.array_equal(constant_of(graph.initializers[named]), numbers):
                return graph.initializers[named]
            named, calls = f"{name}.{suffix}.{calls}", calls + 1
        held = ir.tensor(np.array(numbers, order="C"), name=named)
        shape, kind = ir.Shape(np.shape(numbers)), ir.TensorType(held.dtype)
        value = ir.Value(name=named, shape=shape, type=kind, const_value=held)
        graph.register_initializer(value)
        return value

    unsigned = (codes.astype(np.int16) + _WEIGHT_OFFSET).astype(np.uint8)
    inputs = [source.inputs[0], initializer("unsigned_weight", unsigned)]
    zero_points = source.inputs[2] if len(source.inputs) > 2 else initializer("input_zero_point", np.uint8(0))
    inputs += [zero_points, initializer("unsigned_weight.zero_point", np.uint8(_WEIGHT_OFFSET))]
    made = [ir.node("ConvInteger", inputs, dict(node.attributes))]
    if bias is None:
        multiplier = _numbers(source.inputs[1]).astype(np.float32) * constant_of(weight.inputs[1])
    else:
        multiplier = constant_of(bias.inputs[1])
        numbers = constant_of(bias.inputs[0]).reshape(along_channels)
        made.append(ir.node("Add", [made[-1].outputs[0], initializer("bias_of_sums", numbers)]))
    for step in made:
        step.outputs[0].dtype, step.outputs[0].shape = ir.DataType.INT32, result.shape
    made.append(ir.node("Cast", [made[-1].outputs[0]], {"to": ir.DataType.FLOAT}))
    factors = initializer("multiplier_of_sums", np.broadcast_to(multiplier, (len(codes),)).reshape(along_channels))
    made.append(ir.node("Mul", [made[-1].outputs[0], factors]))
    for step in made[-2:]:
        step.outputs[0].dtype, step.outputs[0].shape = ir.DataType.FLOAT, result.shape
    replace_nodes_and_values(graph, node, [node], made, node.outputs, made[-1].outputs)
    for maker in (weight, bias):
        if maker is not None:
            _drop(graph, maker)


def _drop(graph: Any, maker: Any) -> None:
    """Remove a DequantizeLinear of constants (``maker``) that nothing reads any more, and its constants likewise."""
    if maker.outputs[0].uses():
        return
    constants = [value for value in maker.inputs if value is not None]
    graph.remove(maker, safe=True)
    for value in constants:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            graph.initializers.pop(value.name, None)
