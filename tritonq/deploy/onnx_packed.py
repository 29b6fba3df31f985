"""Weights of four bits and fewer as INT4 and UINT4 initialisers, two codes per byte (opset 21)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

# The oldest with DequantizeLinear of four and of 16 bits, and the format's version that came with it.
PACKED_OPSET = 21
_IR_VERSION = 10
_SIGNED, _UNSIGNED = (-8, 7), (0, 15)
_logger = logging.getLogger("tritonq")


def pack_weights(proto: Any) -> None:
    """Store constants that DequantizeLinear reads with four bits where all their codes fit, in place.

    Signed codes of -8..7 become INT4, others of 0..15 UINT4. The log tells how many bytes that saves.
    """
    import onnx

    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    packed: dict[str, int] = {}
    for name, tensor in constants.items():
        nodes = readers.get(name, [])
        if any(node.op_type != "DequantizeLinear" or node.input[0] != name for node in nodes) or not nodes:
            continue
        if tensor.data_type not in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8):
            continue
        # Codes of eight bits that are all small may have a zero point that is not.
        zero_points = [constants[node.input[2]] for node in nodes if len(node.input) > 2 and node.input[2]]
        signed = tensor.data_type == onnx.TensorProto.INT8 and _fits(tensor, _SIGNED)
        if not all(_fits(held, _SIGNED if signed else _UNSIGNED) for held in (tensor, *zero_points)):
            continue
        for node in nodes:
            _pack_zero_point(graph, constants, node, signed)
        before = len(tensor.raw_data)
        _pack(tensor, signed)
        packed[name] = before - len(tensor.raw_data)
    _forget_types(graph, packed)
    _drop_unread(graph)
    for entry in proto.opset_import:
        if entry.domain == "":
            entry.version = max(entry.version, PACKED_OPSET)
    proto.ir_version = max(proto.ir_version, _IR_VERSION)
    _logger.info(
        "weights of four bits and fewer are packed (%d constants, %d bytes less); ONNX Runtime computes in float there",
        len(packed),
        sum(packed.values()),
    )


def is_packed(tensor: Any) -> bool:
    """Whether a constant of a graph has four bits per code."""
    import onnx

    return tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def is_wide(tensor: Any) -> bool:
    """Whether a constant of a graph has 16 bits per code."""
    import onnx

    return tensor.data_type in (onnx.TensorProto.INT16, onnx.TensorProto.UINT16)


def _fits(tensor: Any, limits: tuple[int, int]) -> bool:
    import onnx

    codes, (lowest, highest) = onnx.numpy_helper.to_array(tensor), limits
    return bool(codes.size) and bool((codes >= lowest).all()) and bool((codes <= highest).all())


def _pack(tensor: Any, is_signed: bool) -> None:
    """Give a constant of one byte per code half a byte per code, the first in the low half."""
    import onnx

    codes = onnx.numpy_helper.to_array(tensor)
    halves = codes.reshape(-1).astype(np.uint8) & 15
    halves = np.append(halves, np.zeros(halves.size % 2, np.uint8))
    dimensions = list(tensor.dims)
    name = tensor.name
    tensor.Clear()
    tensor.name = name
    tensor.dims.extend(dimensions)
    tensor.data_type = onnx.TensorProto.INT4 if is_signed else onnx.TensorProto.UINT4
    tensor.raw_data = (halves[0::2] | (halves[1::2] << 4)).tobytes()


def _pack_zero_point(graph: Any, constants: dict[str, Any], node: Any, is_signed: bool) -> None:
    """Give a DequantizeLinear a zero point of its codes' type, under a name of its own."""
    if len(node.input) < 3 or not node.input[2]:
        return
    made = graph.initializer.add()
    made.CopyFrom(constants[node.input[2]])
    made.name = f"{node.output[0]}.zero_point"
    _pack(made, is_signed)
    node.input[2] = made.name


def _forget_types(graph: Any, names: Iterable[str]) -> None:
    """Drop notes on the types of constants, which have changed."""
    changed = frozenset(names)
    for index in reversed(range(len(graph.value_info))):
        if graph.value_info[index].name in changed:
            del graph.value_info[index]


def _drop_unread(graph: Any) -> None:
    read = {name for node in graph.node for name in node.input}
    read |= {output.name for output in graph.output}
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]
