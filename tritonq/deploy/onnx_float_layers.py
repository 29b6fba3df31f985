"""Layers of an ONNX file that ONNX Runtime runs in integers, or in float although their weights are integers."""

from __future__ import annotations

import re
import warnings
from typing import Any

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_WEIGHT = re.compile(r"\.weight_*$")

# What ONNX Runtime runs in integers between DequantizeLinear and QuantizeLinear.
_LAYERS = ("Conv", "Gemm")


def quantize_layers_at_once(graph: Any) -> None:
    """Put a QuantizeLinear that divides by the scale directly behind layers with integer input, weight and bias.

    The layers are Conv and Gemm whose inputs all come from DequantizeLinear.

    Quantizers behind clips are written with a division of their own (a Mul by the reciprocal, then a QuantizeLinear of
    scale 1), because ONNX Runtime would quantize a float layer that QuantizeLinear follows. A layer in integers needs
    that QuantizeLinear: the Mul is removed, and the QuantizeLinear gets the scale. Where anything else reads the
    layer's or the Mul's result, nothing changes.

    Args:
        graph: an ``onnx_ir.Graph``; changed in place.
    """
    for node in list(graph):
        if node.op_type != "Mul" or not _is_integer_layer(node.inputs[0].producer()):
            continue
        readers = [reader for reader, _ in node.outputs[0].uses()]
        scale = _scale_of(readers[0]) if [reader.op_type for reader in readers] == ["QuantizeLinear"] else None
        if scale is not None and len(node.inputs[0].uses()) == 1 and not node.inputs[0].is_graph_output():
            readers[0].replace_input_with(0, node.inputs[0])
            readers[0].replace_input_with(1, scale)
            graph.remove(node, safe=True)


def _is_integer_layer(node: Any) -> bool:
    if node is None or node.op_type not in _LAYERS:
        return False
    producers = [None if value is None else value.producer() for value in node.inputs]
    return all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def _scale_of(quantize: Any) -> Any:
    """Return the scale with which the codes of a QuantizeLinear are dequantized, perhaps behind a clip.

    None if no DequantizeLinear follows.
    """
    reader = quantize
    while reader is not None and reader.op_type in ("QuantizeLinear", "Clip", "Min", "Max"):
        readers = [next_ for next_, _ in reader.outputs[0].uses()]
        reader = readers[0] if readers else None
    return reader.inputs[1] if reader is not None and reader.op_type == "DequantizeLinear" else None


def float_convolutions(proto: Any) -> list[str]:
    """Return the names of convolutions with integer weights that ONNX Runtime will run in float.

    Those are all ConvTranspose nodes, and the Conv nodes whose result is an output of the graph or is read by anything
    but QuantizeLinear: ONNX Runtime fuses ``DequantizeLinear → Conv → QuantizeLinear`` into an integer convolution, and
    nothing less. What `onnx_exact_sums` wrote by ConvInteger is no Conv any more. Weights that are floats or have a
    scale per block are left out, and those packed by ``pack=True`` before QuantizeLinear: they run in float by choice.

    A convolution's name is that of its weight's codes in the file without ``.weight``, and without the underscores that
    `separate_weights` puts behind it for further calls; each name is returned once, in the order of the nodes.
    ``proto`` is the file's ``onnx.ModelProto``.
    """
    graph = proto.graph
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    outputs = {value.name for value in graph.output}
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type in _float_types()}
    found = []
    for node in graph.node:
        weight = producers.get(node.input[1]) if node.op_type in _CONVOLUTIONS else None
        if weight is None or weight.op_type != "DequantizeLinear" or _has_blocks(weight) or weight.input[0] in floats:
            continue
        result = node.output[0]
        is_transposed = node.op_type == "ConvTranspose"
        if is_transposed or result in outputs or set(readers.get(result, ())) != {"QuantizeLinear"}:
            found.append(_WEIGHT.sub("", weight.input[0]))
    return list(dict.fromkeys(found))


def _float_types() -> set[int]:
    """Return the types of initialisers that hold codes of floats, as far as this onnx knows them."""
    import onnx

    return {kind for name, kind in onnx.TensorProto.DataType.items() if name.startswith(("FLOAT8", "FLOAT4"))}


def _has_blocks(node: Any) -> bool:
    """Whether a DequantizeLinear has a scale per block; no runtime has integer convolutions with such weights."""
    return any(attribute.name == "block_size" and attribute.i for attribute in node.attribute)


def tell_float_convolutions(proto: Any) -> None:
    """Warn (UserWarning) of the convolutions of a file that ONNX Runtime will run in float, with their names.

    ``proto`` is the file's ``onnx.ModelProto``. Nothing happens if :func:`float_convolutions` finds none.
    """
    names = float_convolutions(proto)
    if names:
        warnings.warn(
            "ONNX Runtime convolves in integers only where all calls of a layer read one grid, packed weights, "
            "activations with a grid per channel and transposed or 3-d convolutions of some kinds never; it will run "
            "in float: "
            f'{", ".join(names)}. Other presets leave such quantizers out; get_qconfig("onnxruntime") has them',
            stacklevel=4,
        )
