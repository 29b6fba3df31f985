"""Convolutions of a file that ONNX Runtime runs in float, although their weights are integers."""

from __future__ import annotations

import warnings
from typing import Any

_CONVOLUTIONS = ("Conv", "ConvTranspose")


def float_convolutions(proto: Any) -> list[str]:
    """Return the names of convolutions with integer weights that are transposed, or not quantized at once.

    ONNX Runtime fuses ``DequantizeLinear → Conv → QuantizeLinear`` into an integer convolution, and nothing less. For
    transposed convolutions it has no integer kernel.
    """
    graph = proto.graph
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    outputs = {value.name for value in graph.output}
    found = []
    for node in graph.node:
        weight = producers.get(node.input[1]) if node.op_type in _CONVOLUTIONS else None
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        result = node.output[0]
        is_transposed = node.op_type == "ConvTranspose"
        if is_transposed or result in outputs or set(readers.get(result, ())) != {"QuantizeLinear"}:
            found.append(weight.input[0].removesuffix(".weight"))
    return list(dict.fromkeys(found))


def tell_float_convolutions(proto: Any) -> None:
    """Warn of :func:`float_convolutions`, with names."""
    names = float_convolutions(proto)
    if names:
        warnings.warn(
            "ONNX Runtime convolves in integers only where a quantizer follows at once and all calls read one grid, "
            f"and never transposed; it will run in float: {', '.join(names)}. Presets for TensorRT leave such "
            'quantizers out; get_qconfig("onnxruntime") has them',
            stacklevel=4,
        )
