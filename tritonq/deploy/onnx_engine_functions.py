"""Functions for which ONNX Runtime has one operator of its own, in place of several operators of the standard.

Between DequantizeLinear and QuantizeLinear each operator is a pass over float values. ONNX Runtime also repeats a
DequantizeLinear that two operators read, so that its fusions no longer find their patterns: SiLU takes half the time as
QuickGelu. ONNX Runtime 1.18 and OpenVINO know these operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class _EngineFunction:
    """An operator of ONNX Runtime that computes a whole function.

    Attributes:
        operator: its name.
        composed: names of the standard operators of which the exporter composes the function.
        attributes: names and values of the operator's attributes.
    """

    operator: str
    composed: frozenset[str]
    attributes: tuple[tuple[str, float], ...] = ()


_FUNCTIONS = {
    "silu": _EngineFunction("QuickGelu", frozenset({"Sigmoid", "Mul"}), (("alpha", 1.0),)),
    "gelu": _EngineFunction("Gelu", frozenset({"Div", "Erf", "Add", "Mul"})),
    "tanh_gelu": _EngineFunction("FastGelu", frozenset({"Pow", "Mul", "Add", "Tanh"})),
}


def engine_function(function: str, source: str, result: str, nodes: Sequence[Any]) -> list[Any] | None:
    """Return the nodes of a function with ONNX Runtime's own operator in place of several of the standard's.

    None if ONNX Runtime has none for it, or if ``nodes`` are not the standard operators that it replaces.

    Args:
        function: name of the function. ONNX Runtime's operator is QuickGelu for ``"silu"``, Gelu for ``"gelu"`` and
            FastGelu for ``"tanh_gelu"``; it has none for others.
        source: name of the tensor with the codes of its input.
        result: name of the tensor with the codes of its result.
        nodes: all nodes (``onnx.NodeProto``) between the two, from DequantizeLinear to QuantizeLinear; not changed.

    Returns:
        DequantizeLinear, the operator, QuantizeLinear; the first and the last are those among ``nodes``.
    """
    import onnx

    known = _FUNCTIONS.get(function)
    first = [node for node in nodes if node.op_type == "DequantizeLinear" and node.input[0] == source]
    last = [node for node in nodes if node.op_type == "QuantizeLinear" and node.output[0] == result]
    between = {node.op_type for node in nodes if node not in first and node not in last}
    if known is None or len(first) != 1 or len(last) != 1 or between != known.composed:
        return None
    names = ([first[0].output[0]], [last[0].input[0]])
    made = onnx.helper.make_node(known.operator, *names, domain=_DOMAIN, **dict(known.attributes))
    return [first[0], made, last[0]]


def put_engine_function(proto: Any, nodes: Sequence[Any]) -> None:
    """Put the operator that :func:`engine_function` made into the file, in place of the last node that it replaces.

    The other nodes that it replaces stay in the file, though nothing reads them; the caller drops them.

    Args:
        proto: the file's content, an ``onnx.ModelProto``; changed in place.
        nodes: the result of :func:`engine_function`, not None.
    """
    import onnx

    graph, made = proto.graph, nodes[1]
    place = next(index for index, node in enumerate(graph.node) if made.output[0] in node.output)
    made.name = graph.node[place].name
    graph.node[place].CopyFrom(made)
    if not any(entry.domain == _DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
