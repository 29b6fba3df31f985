"""What all kinds of ONNX files have in common: metadata keys, and corrections after torch's exporter.

``proto`` is always an ``onnx.ModelProto``, ``graph`` an ``onnx.GraphProto``.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

# Under these keys a file says, for `verify`, where its codes are, for which target it was written, and what integers it
# takes and returns.
CODES_KEY = "tritonq.codes"
TARGET_KEY = "tritonq.target"
ENDS_KEY = "tritonq.ends"
_OWN_KEYS = frozenset({CODES_KEY, TARGET_KEY, ENDS_KEY})
# What may stand between int8 weights and the operator that computes with them.
_BEFORE_WEIGHTS = ("DequantizeLinear", "Transpose", "Reshape")
# Of operators that read weights as codes: which input these are, and which one is their zero point.
_ZERO_POINTS = {"DequantizeLinear": (0, 2), "MatMulInteger": (1, 3)}
_INT8 = 3  # onnx.TensorProto.INT8


def require_onnx(*packages: str) -> None:
    """Import packages, such as ``"onnx"``; raise ImportError, which names the extra to install, if one is missing."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"{name} can't be imported; install the extra: pip install 'tritonq[onnx]'") from error


def code_entries(proto: Any) -> list[dict[str, Any]]:
    """Return the list of codes that an ONNX model of tritonq has in its metadata, in the order of the graph.

    Each entry has "quantizer", name of a quantizer in the model, or of a layer in fixed point; "tensor", name of its
    codes in the graph (of a layer in fixed point: of those that it reads); "zero_point", a number or a list; and
    "axis", that of the zero points (None: one grid for the tensor). For codes of floats "tensor" names their values,
    "zero_point" is 0, "axis" that of the scales, and the entry has "format" (``"e4m3"`` or ``"e5m2"``) and "scale" (a
    number or a list), too.

    Raises:
        ValueError: the model has no such list.
    """
    text = next((entry.value for entry in proto.metadata_props if entry.key == CODES_KEY), None)
    if text is None:
        raise ValueError(f"this ONNX model has no {CODES_KEY!r} in its metadata: export_onnx did not write it")
    entries: list[dict[str, Any]] = json.loads(text)
    return entries


def checked(proto: Any) -> bytes:
    """Return an ONNX model as the bytes of a file, after onnx's checker found it valid.

    Raises:
        ValueError: the checker, which also infers shapes, finds it invalid.
    """
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the file of this model would be no valid ONNX: {reason}") from error
    content: bytes = proto.SerializeToString()
    return content


def drop_unread(graph: Any) -> None:
    """Delete from an ONNX graph, in place, the nodes and initialisers that neither a node nor an output reads.

    What only deleted nodes read is deleted, too. What nodes in the branches of an If and the like read is kept, and in
    the branches nothing is deleted.
    """
    outputs = {output.name for output in graph.output}
    while True:
        read = {*_names_read(graph), *outputs}
        unread = [node for node in graph.node if not any(name in read for name in node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _names_read(graph: Any) -> Iterator[str]:
    """Yield the names of all tensors that a graph's nodes read, those in graphs of their attributes among them."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            inner = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
            for branch in inner:
                yield from (output.name for output in branch.output)
                yield from _names_read(branch)


def add_metadata(proto: Any, metadata: Mapping[str, str] | None) -> None:
    """Add a user's metadata to an ONNX model, in place.

    Args:
        proto: the model.
        metadata: texts by name; None: nothing is added.

    Raises:
        ValueError: a key or value that is not text, a key that the file has already, ``"tritonq.codes"`` or
            ``"tritonq.target"``. Then nothing is added.
    """
    taken = {entry.key for entry in proto.metadata_props} | _OWN_KEYS
    entries = list((metadata or {}).items())
    for key, value in entries:
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata of an ONNX file are texts by name, got {key!r}: {value!r}")
        if key in taken:
            raise ValueError(f"the file itself has metadata named {key!r}: choose another name")
    for key, value in entries:
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value


def forget_source(proto: Any) -> None:
    """Delete the exporter's notes on nodes and values of a file, in place: stack traces, paths, source code.

    The metadata of the file itself stay.
    """
    graph = proto.graph
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    graph.doc_string = ""
    del graph.metadata_props[:]


def separate_weights(proto: Any) -> None:
    """Give each operator that reads quantized weights in a file codes and zero points of its own, in place.

    ONNX Runtime's option ``session.x64quantprecision``, which CPUs of x86 without VNNI need, rewrites weights and zero
    points one reader at a time, and fails where two readers share one, as those of a layer that runs twice do.
    """
    graph = proto.graph
    taken = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    taken |= {tensor.name for tensor in graph.initializer}
    _separate_codes(graph, taken)
    _separate_zero_points(graph, taken)


def _separate_codes(graph: Any, taken: set[str]) -> None:
    """Copy int8 weights, and what is between them and their reader, for each reader but the first."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    read: set[str] = set()
    nodes: list[Any] = []
    for node in graph.node:
        for place, name in enumerate(node.input if node.op_type not in _BEFORE_WEIGHTS else ()):
            path = []  # nodes from the operand back to the weights
            while name in makers and makers[name].op_type in _BEFORE_WEIGHTS:
                path.append(makers[name])
                name = path[-1].input[0]
            if name not in constants or constants[name].data_type != _INT8:
                continue
            if not path and place != _ZERO_POINTS.get(node.op_type, (None,))[0]:
                continue
            if name in read:
                name = _copy_constant(graph, constants[name], name, taken)
                for original in reversed(path):
                    copied = type(original)()
                    copied.CopyFrom(original)
                    copied.name = _free_name(original.name, taken)
                    copied.input[0] = name
                    name = copied.output[0] = _free_name(original.output[0], taken)
                    nodes.append(copied)
                node.input[place] = name
            read.add(name)
        nodes.append(node)
    if len(nodes) > len(graph.node):
        nodes = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(nodes)
        drop_unread(graph)  # what stood before the weights of copied readers alone


def _separate_zero_points(graph: Any, taken: set[str]) -> None:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        weight, point = _ZERO_POINTS.get(node.op_type, (0, len(node.input)))
        if len(node.input) <= point or node.input[weight] not in constants:
            continue
        shared = node.input[point]
        if shared not in constants or uses[shared] < 2:
            continue
        node.input[point] = _copy_constant(graph, constants[shared], f"{node.input[weight]}.zero_point", taken)
        uses[shared] -= 1


def _copy_constant(graph: Any, tensor: Any, name: str, taken: set[str]) -> str:
    """Append a copy of an initialiser to a graph, and return its name, which begins with ``name``."""
    copied = graph.initializer.add()
    copied.CopyFrom(tensor)
    copied.name = _free_name(name, taken)
    return str(copied.name)


def _free_name(name: str, taken: set[str]) -> str:
    """Return ``name``, with underscores behind it if it is in ``taken``, to which the result is added."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
