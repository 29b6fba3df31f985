"""Operations that move values, in an ONNX graph: their results are quantized once more, so that layers read codes.

A *pair* is a QuantizeLinear and a DequantizeLinear with one scale and zero point. ONNX Runtime runs a convolution in
integers if DequantizeLinear feeds it. With a Slice, Split, Resize or the like between the two it runs in float. A
second pair behind these, of the same grid, changes no code, and ONNX Runtime then moves codes, or at least computes the
layer in integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Their results hold elements of their first input, or of all inputs (Concat), and nothing else.
_MOVING = frozenset(
    [
        *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool"),
        *(
            "Pad",
            "ReduceMax",
            "ReduceMin",
            "Reshape",
            "Resize",
            "Slice",
            "SpaceToDepth",
            "Split",
            "Squeeze",
            "Tile",
            "TopK",
            "Transpose",
        ),
        "Unsqueeze",
    ]
)
# What computes on codes where DequantizeLinear feeds it and QuantizeLinear follows.
_READERS = frozenset(
    [
        *("Add", "Concat", "Conv", "ConvTranspose", "Gemm", "GlobalAveragePool", "LeakyRelu", "MatMul", "Mul"),
        *("Sigmoid", "Softmax"),
    ]
)
# A scale and a zero point, as numbers.
_Grid = tuple[float, int]


def quantize_behind_moves(graph: Any) -> None:
    """Add a pair behind what moves values between a DequantizeLinear and an operator of ``_READERS``, such as Conv.

    The pair has the grid of that DequantizeLinear. A ReLU between these two operators becomes a Clip on codes, or is
    removed if the codes are uint8 with zero point 0. A pair is also put before each input of a Concat that lies on no
    grid, such as a class token, if another input lies on one and the only reader of the result is a QuantizeLinear with
    one constant scale. Grids per channel and of floats do not count.

    Args:
        graph: an ``onnx_ir.Graph``; changed in place.
    """
    nodes = list(graph)
    pairs: dict[Any, Any] = {}  # by value on a grid, the DequantizeLinear whose grid it is
    for node in nodes:
        if _grid_of(node) is not None:
            pairs[node.outputs[0]] = node
        elif node.op_type == "Relu" and node.inputs[0] in pairs:
            pairs[node.outputs[0]] = pairs[node.inputs[0]]
        elif moves_values(node) and (source := _common_source(node, pairs)) is not None:
            pairs.update(dict.fromkeys(node.outputs if node.op_type == "Split" else node.outputs[:1], source))
    wanted: set[Any] = set()
    for node in reversed(nodes):
        if node.op_type in _READERS or not wanted.isdisjoint(node.outputs):
            wanted.update(value for value in node.inputs if value in pairs)
    for node in nodes:
        for value in node.outputs:
            if value in wanted and _grid_of(node) is None:
                _requantize(graph, node, value, pairs[value])
        if node.op_type == "Concat":
            _quantize_parts(graph, node, pairs)


def _quantize_parts(graph: Any, node: Any, pairs: dict[Any, Any]) -> None:
    """Add pairs before the parts of a concatenation that no quantizer made, such as a class token.

    Their grid is that of the quantizer behind the concatenation. ONNX Runtime concatenates codes only if
    DequantizeLinear feeds all parts. QuantizeLinear rounds each value by itself, so the codes are those that it would
    give behind the concatenation.

    Args:
        graph: an ``onnx_ir.Graph``; changed in place.
        node: a Concat.
        pairs: values on a grid, and the DequantizeLinear with that grid.
    """
    import onnx_ir as ir

    users = [user for user, _ in node.outputs[0].uses()]
    on_grids = [value in pairs or _grid_of(value.producer()) is not None for value in node.inputs]
    if len(users) != 1 or users[0].op_type != "QuantizeLinear" or not any(on_grids):
        return
    _, scale, zero_point = users[0].inputs[:3]
    if constant_of(scale) is None or constant_of(scale).ndim != 0 or zero_point is None:
        return
    for index, (value, on_grid) in enumerate(zip(list(node.inputs), on_grids, strict=True)):
        if on_grid:
            continue
        first = ir.node("QuantizeLinear", [value, scale, zero_point])
        second = _dequantize(first, value, users[0].inputs[1:3], zero_point.dtype)
        graph.insert_before(node, [first, second])
        node.replace_input_with(index, second.outputs[0])


def _grid_of(node: Any) -> _Grid | None:
    """Return scale and zero point of a DequantizeLinear of activations; None for weights, floats and other nodes."""
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0].producer() is None or len(node.inputs) < 3:
        return None
    scale, zero_point = (constant_of(value) for value in node.inputs[1:3])
    # Nothing computes on floats of eight bits, and ONNX Runtime (1.31) has no MaxPool or Unsqueeze that moves them.
    if scale is None or zero_point is None or scale.ndim != 0 or zero_point.dtype.kind not in "iu":
        return None
    return float(scale), int(zero_point)


def constant_of(value: Any) -> Any:
    """Return the NumPy array that an `onnx_ir.Value` holds; None if the value is None or no constant."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def moves_values(node: Any) -> bool:
    """Whether an ``onnx_ir.Node`` moves values: its first result (of Split each) has only elements of its first input.

    Of Concat the elements are those of all inputs. Only the operations listed in ``_MOVING`` count: MaxPool, ReduceMax
    and TopK are among them; Relu, Max and Where are not. Resize counts in mode "nearest". Pad counts if it copies
    elements, or fills with zero, which is on every grid; not if its constant is another or is not in the file.
    """
    if node.op_type not in _MOVING:
        return False
    if node.op_type == "Resize":
        mode = node.attributes.get("mode")
        return mode is None or mode.as_string() == "nearest"
    if node.op_type == "Pad":
        mode = node.attributes.get("mode")
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        constant = mode is None or mode.as_string() == "constant"
        return not constant or fill is None or bool((found := constant_of(fill)) is not None and found == 0)
    return True


def _common_source(node: Any, pairs: dict[Any, Any]) -> Any:
    """Return the DequantizeLinear with the grid of all values that a node moves; None if they have no common grid.

    ``pairs`` has, for each value known to lie on a grid, the DequantizeLinear with that grid.
    """
    if node.op_type == "Concat":
        sources = [pairs.get(value) for value in node.inputs]
        grids = {None if source is None else _grid_of(source) for source in sources}
        followed = [user.op_type for user, _ in node.outputs[0].uses()]
        return sources[0] if len(grids) == 1 and None not in grids and followed != ["QuantizeLinear"] else None
    return pairs.get(node.inputs[0])


def _requantize(graph: Any, node: Any, value: Any, source: Any) -> None:
    """Add a pair behind ``value``, a result of ``node``, for all its readers; its grid is that of ``source``.

    A Relu behind a DequantizeLinear becomes a Clip of the codes at the zero point, or is removed if they are uint8 with
    a zero point of 0.
    """
    import onnx_ir as ir

    _, scale, zero_point = source.inputs
    readers = list(value.uses())
    before = node.inputs[0].producer()
    if node.op_type == "Relu" and before is not None and before.op_type == "DequantizeLinear":
        codes = before.inputs[0]
        if _grid_of(source)[1] == 0 and codes.dtype == ir.DataType.UINT8:  # type: ignore[index]
            _replace(readers, node.inputs[0])
            _remove_unused(graph, node)
            return
        first = ir.node("Clip", [codes, zero_point])
    else:
        first = ir.node("QuantizeLinear", [value, scale, zero_point])
    second = _dequantize(first, value, (scale, zero_point), source.inputs[0].dtype)
    graph.insert_after(node, [first, second])
    _replace(readers, second.outputs[0])
    _remove_unused(graph, node)


def _dequantize(first: Any, value: Any, grid: Sequence[Any], dtype: Any) -> Any:
    """Return a DequantizeLinear of the codes of ``value`` that the node ``first`` makes.

    ``grid`` is scale and zero point.
    """
    import onnx_ir as ir

    second = ir.node("DequantizeLinear", [first.outputs[0], *grid])
    first.outputs[0].dtype, second.outputs[0].dtype = dtype, value.dtype
    first.outputs[0].shape, second.outputs[0].shape = value.shape, value.shape
    return second


def _remove_unused(graph: Any, node: Any) -> None:
    if not any(value.uses() or value.is_graph_output() for value in node.outputs):
        graph.remove(node, safe=True)


def _replace(readers: list[Any], new: Any) -> None:
    for reader, index in readers:
        reader.replace_input_with(index, new)
