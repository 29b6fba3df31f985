"""ONNX files of opset 17, the newest that TensorRT 8 reads, from those of opset 18, the oldest that torch writes."""

from __future__ import annotations

from typing import Any

from tritonq.deploy.onnx_files import drop_unread

OPSET = 17
# Files of opset 17 came with this version of the format.
_IR_VERSION = 8
# Opset 18 gives them their axes as an input. ReduceSum's are one in both.
_REDUCTIONS = frozenset(
    [
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
        *("ReduceProd", "ReduceSumSquare"),
    ]
)
_NEW_OPERATORS = frozenset(
    [
        *("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im", "GroupNormalization"),
        *("Mish", "OptionalGetElement", "OptionalHasElement"),
    ]
)
# Attributes that opset 18 added, and the values under which an operator does what it did before.
_NEW_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
    "Split": {"num_outputs": None},
    **{name: {"noop_with_empty_axes": 0} for name in _REDUCTIONS},
}


def lower_opset(proto: Any) -> None:
    """Rewrite a file of opset 18 as one of opset 17, in place; ``proto`` is its content, an ``onnx.ModelProto``.

    Axes of reductions become attributes, and attributes that opset 18 added are dropped if they have the value under
    which an operator does what it did before.

    Raises:
        ValueError: an operator that opset 17 lacks, or one used in a way that it can't express; the message names it.
            ``proto`` is then partly rewritten.
    """
    import onnx

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    constants |= {
        node.output[0]: node.attribute[0].t
        for node in proto.graph.node
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value"
    }
    for node in proto.graph.node:
        if node.op_type in _NEW_OPERATORS or (node.op_type == "Pad" and len(node.input) > 3 and node.input[3]):
            raise ValueError(f"opset {OPSET} has no {node.op_type} as the model needs it; export with opset=18")
        _drop_new_attributes(node)
        if node.op_type in _REDUCTIONS and len(node.input) > 1:
            axes = constants.get(node.input[1])
            if axes is None:
                raise ValueError(f"opset {OPSET} takes constant axes alone in {node.op_type}; export with opset=18")
            values = onnx.numpy_helper.to_array(axes).reshape(-1).tolist()
            node.attribute.append(onnx.helper.make_attribute("axes", values))
            del node.input[1]
    for entry in proto.opset_import:
        if entry.domain == "":
            entry.version = OPSET
    proto.ir_version = min(proto.ir_version, _IR_VERSION)
    drop_unread(proto.graph)


def _drop_new_attributes(node: Any) -> None:
    known = _NEW_ATTRIBUTES.get(node.op_type, {})
    for attribute in [held for held in node.attribute if held.name in known]:
        usual = known[attribute.name]
        if usual is not None and usual != (attribute.s if isinstance(usual, bytes) else attribute.i):
            raise ValueError(f"opset {OPSET} has no {node.op_type} with {attribute.name}; export with opset=18")
        node.attribute.remove(attribute)
