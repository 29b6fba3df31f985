"""What all kinds of ONNX files have in common: metadata keys, and corrections after torch's exporter."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

# Under these keys a file says, for `verify`, where its codes are and for which target it was written.
CODES_KEY = "tritonq.codes"
TARGET_KEY = "tritonq.target"


def require_onnx(*packages: str) -> None:
    """Raise ImportError, which names the extra to install, if one of the packages can't be imported."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"{name} can't be imported; install the extra: pip install 'tritonq[onnx]'") from error


def code_entries(proto: Any) -> list[dict[str, Any]]:
    """Return the list of codes that an ONNX model of tritonq has in its metadata, in the order of the graph.

    Each entry has "quantizer", name of a quantizer, or of a layer in fixed point; "tensor", name of its codes in the
    graph; "zero_point", a number or a list; and "axis", that of the zero points (None: one grid for the tensor). For
    codes of floats "tensor" names their values, and the entry has "format" and "scale", too.

    Args:
        proto: an ``onnx.ModelProto``.

    Raises:
        ValueError: the model has no such list.
    """
    text = next((entry.value for entry in proto.metadata_props if entry.key == CODES_KEY), None)
    if text is None:
        raise ValueError(f"this ONNX model has no {CODES_KEY!r} in its metadata: export_onnx did not write it")
    entries: list[dict[str, Any]] = json.loads(text)
    return entries


def checked(proto: Any) -> bytes:
    """Return an ONNX model as bytes.

    Raises:
        ValueError: it is no valid model.
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
        proto: the model, an ``onnx.ModelProto``.
        metadata: texts by name; None: nothing is added.

    Raises:
        ValueError: a key or value that is not text, or a key that the file has already or that tritonq's own metadata
            have. Then nothing is added.
    """
    taken = {entry.key for entry in proto.metadata_props} | {CODES_KEY, TARGET_KEY}
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
    """Delete the exporter's notes on nodes and values of a file, in place: stack traces, paths, source code."""
    graph = proto.graph
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    graph.doc_string = ""
    del graph.metadata_props[:]


def separate_zero_points(proto: Any) -> None:
    """Give each quantized weight of a file a zero point tensor of its own, in place.

    ONNX Runtime's option ``session.x64quantprecision``, which CPUs of x86 without VNNI need, rewrites weights and zero
    points one layer at a time, and fails where two layers share one.
    """
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    taken = set(constants)
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[0] not in constants:
            continue
        shared = node.input[2]
        if shared not in constants or uses[shared] < 2:
            continue
        name = f"{node.input[0]}.zero_point"
        while name in taken:
            name += "_"
        taken.add(name)
        copied = graph.initializer.add()
        copied.CopyFrom(constants[shared])
        copied.name = name
        node.input[2] = name
        uses[shared] -= 1
