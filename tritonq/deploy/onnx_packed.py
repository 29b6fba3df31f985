"""Weights of four bits and fewer in ONNX files as INT4, UINT4 and FLOAT4E2M1, two codes per byte (opset 21, 23).

A *constant* is an initializer of the graph, an ``onnx.TensorProto``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from tritonq.deploy.onnx_files import drop_unread
from tritonq.formats import FLOAT_FORMATS
from tritonq.reference.float_rounding import codes_of_floats, floats_of_codes, round_to_float_

# The oldest with DequantizeLinear of four and of 16 bits, and the format's version that came with it.
PACKED_OPSET = 21
_IR_VERSION = 10
_SIGNED, _UNSIGNED = (-8, 7), (0, 15)
# The oldest with floats of four bits, and the format's version that came with it.
_FLOATS_OPSET, _FLOATS_IR_VERSION = 23, 11
_E2M1 = FLOAT_FORMATS["e2m1"]
_logger = logging.getLogger("tritonq")


def pack_weights(proto: Any) -> None:
    """Store each constant of codes that DequantizeLinear reads with four bits per code, if all its codes fit; in place.

    INT8 codes in -8..7 become INT4, other 8-bit integer codes in 0..15 UINT4, and FLOAT8E4M3FN whose numbers E2M1 has
    FLOAT4E2M1. Zero points of integers must fit, too. A constant that another operator reads as well stays as it is.
    The logger ``tritonq`` says, at level INFO, how many bytes that saves. The file's opset becomes at least 21, with
    FLOAT4E2M1 at least 23, even if no constant fits.

    Args:
        proto: the file's content, an ``onnx.ModelProto``.

    Raises:
        ValueError: numbers fit FLOAT4E2M1, and the installed onnx lacks that type. Other constants may be packed then.
    """
    import onnx

    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    packed: dict[str, int] = {}
    has_floats = False
    for name, tensor in constants.items():
        nodes = readers.get(name, [])
        if any(node.op_type != "DequantizeLinear" or node.input[0] != name for node in nodes) or not nodes:
            continue
        if tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN and _holds_e2m1(tensor):
            before = len(tensor.raw_data)
            _pack_floats(tensor)
            for node in nodes:
                del node.input[2:]  # the zero point's type is that of the numbers; without one it is 0
            packed[name] = before - len(tensor.raw_data)
            has_floats = True
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
    drop_unread(graph)
    for entry in proto.opset_import:
        if entry.domain == "":
            entry.version = max(entry.version, _FLOATS_OPSET if has_floats else PACKED_OPSET)
    proto.ir_version = max(proto.ir_version, _FLOATS_IR_VERSION if has_floats else _IR_VERSION)
    _logger.info(
        "weights of four bits and fewer are packed (%d constants, %d bytes less); ONNX Runtime computes in float there",
        len(packed),
        sum(packed.values()),
    )


def widen_floats(proto: Any) -> None:
    """Turn a file's 4-bit floats into 8-bit ones with the same numbers, in place: ONNX Runtime lacks the former.

    Initializers of FLOAT4E2M1 become FLOAT8E4M3FN. What the graph declares on the types of initializers
    (``value_info``) is removed. ``proto`` is an ``onnx.ModelProto``.
    """
    import onnx

    kind = getattr(onnx.TensorProto, "FLOAT4E2M1", None)
    for tensor in proto.graph.initializer:
        if kind is not None and tensor.data_type == kind:
            halves = np.frombuffer(tensor.raw_data, np.uint8)
            codes = np.stack([halves & 15, halves >> 4], -1).reshape(-1)[: int(np.prod(tensor.dims))]
            values = floats_of_codes(torch.from_numpy(np.where(codes & 8, -(codes & 7).astype(np.int8), codes)), _E2M1)
            _replace(tensor, onnx.TensorProto.FLOAT8E4M3FN, values.to(torch.float8_e4m3fn).view(torch.uint8).numpy())
    _forget_types(proto.graph, {tensor.name for tensor in proto.graph.initializer})


def is_packed(tensor: Any) -> bool:
    """Whether a constant has integer codes of four bits (INT4, UINT4); False for FLOAT4E2M1.

    Args:
        tensor: an ``onnx.TensorProto``.
    """
    import onnx

    return tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def is_wide(tensor: Any) -> bool:
    """Whether a constant has 16-bit integer codes; False for float16.

    Args:
        tensor: an ``onnx.TensorProto``.
    """
    import onnx

    return tensor.data_type in (onnx.TensorProto.INT16, onnx.TensorProto.UINT16)


def _numbers(tensor: Any) -> torch.Tensor:
    """Return the numbers of a constant of 8-bit floats as float32."""
    raw = torch.from_numpy(np.frombuffer(tensor.raw_data, np.uint8).copy())
    return raw.view(torch.float8_e4m3fn).float()


def _holds_e2m1(tensor: Any) -> bool:
    numbers = _numbers(tensor)
    return bool(numbers.numel()) and torch.equal(round_to_float_(numbers.clone(), _E2M1), numbers)


def _pack_floats(tensor: Any) -> None:
    """Give a constant of 8-bit floats half a byte per number: sign, two exponent bits, one mantissa bit; in place.

    The first number is in the low half of a byte.

    Raises:
        ValueError: this onnx lacks FLOAT4E2M1.
    """
    import onnx

    kind = getattr(onnx.TensorProto, "FLOAT4E2M1", None)
    if kind is None:
        raise ValueError(
            f"onnx {onnx.__version__} has no FLOAT4E2M1, which pack=True needs for {tensor.name!r}: update it, or "
            "write FLOAT8E4M3FN without pack"
        )
    codes = codes_of_floats(_numbers(tensor), _E2M1).numpy()
    _replace(tensor, kind, _halves(np.where(codes < 0, 8 - codes, codes).astype(np.uint8)))


def _halves(codes: Any) -> Any:
    """Return 4-bit codes two per byte, the first in the low half: uint8."""
    padded = np.append(codes, np.zeros(codes.size % 2, np.uint8))
    return padded[0::2] | (padded[1::2] << 4)


def _replace(tensor: Any, kind: int, content: Any) -> None:
    """Give a constant another ONNX data type (``kind``) and raw bytes (``content``), in place; name and shape stay."""
    dimensions, name = list(tensor.dims), tensor.name
    tensor.Clear()
    tensor.name = name
    tensor.dims.extend(dimensions)
    tensor.data_type = kind
    tensor.raw_data = content.tobytes()


def _fits(tensor: Any, limits: tuple[int, int]) -> bool:
    import onnx

    codes, (lowest, highest) = onnx.numpy_helper.to_array(tensor), limits
    return bool(codes.size) and bool((codes >= lowest).all()) and bool((codes <= highest).all())


def _pack(tensor: Any, is_signed: bool) -> None:
    """Give a constant with a byte per code half a byte per code, as INT4 (``is_signed``) or UINT4; in place.

    The first code is in the low half of a byte.
    """
    import onnx

    codes = onnx.numpy_helper.to_array(tensor).reshape(-1).astype(np.uint8) & 15
    _replace(tensor, onnx.TensorProto.INT4 if is_signed else onnx.TensorProto.UINT4, _halves(codes))


def _pack_zero_point(graph: Any, constants: dict[str, Any], node: Any, is_signed: bool) -> None:
    """Give the DequantizeLinear ``node`` a 4-bit zero point, as its codes need, under a name of its own.

    ``constants`` are those of ``graph`` by name; ``is_signed`` says whether the codes are INT4 or UINT4.
    """
    if len(node.input) < 3 or not node.input[2]:
        return
    made = graph.initializer.add()
    made.CopyFrom(constants[node.input[2]])
    made.name = f"{node.output[0]}.zero_point"
    _pack(made, is_signed)
    node.input[2] = made.name


def _forget_types(graph: Any, names: Iterable[str]) -> None:
    """Delete the graph's notes on the types of these constants, which have changed."""
    changed = frozenset(names)
    for index in reversed(range(len(graph.value_info))):
        if graph.value_info[index].name in changed:
            del graph.value_info[index]
