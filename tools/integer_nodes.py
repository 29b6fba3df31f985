"""Find layers and joins that a summary calls quantized, but that ONNX Runtime does not compute in integers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tritonq.deploy.onnx_files import CODES_KEY
from tritonq.report.summary import ModelSummary

_PRODUCTS = ("QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger")
_IN_FLOAT = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulIntegerToFloat")
_LAYERS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear")
_JOINS = {
    "add": "QLinearAdd",
    "sub": "QLinearAdd",
    "mul": "QLinearMul",
    "cat": "QLinearConcat",
    "stack": "QLinearConcat",
    **dict.fromkeys(("matmul", "einsum", "scaled_dot_product_attention"), "QLinearMatMul"),
    **dict.fromkeys(("addmm", "baddbmm"), "QLinearAdd"),
}
# These stand between a join and its codes and move or clip them. A concatenation of one grid moves codes itself.
_MOVES = ("Clip", "Min", "Max", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")


def float_parts(summary: ModelSummary, path: Path) -> list[str]:
    """Return the names of layers and joins that a summary calls quantized and ONNX Runtime computes in float.

    Args:
        summary: of the prepared or converted model.
        path: its ONNX file; the optimised graph is written beside it.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".optimised.onnx")), 4
    # Fusions, but not the layouts that come after them, which rename tensors.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(options.optimized_model_filepath).graph
    written = onnx.load(path)
    weights = {tensor.name for tensor in written.graph.initializer}
    quantized = [row for row in summary.layers if row.status == "quantized"]
    layers = [row.name for row in quantized if row.kind in _LAYERS and f"{row.name}.weight" in weights]
    joins = {row.name: _JOINS[row.kind] for row in quantized if row.kind in _JOINS}
    return [*_float_layers(optimised, layers), *_float_joins(optimised, _codes(written), joins)]


def _codes(model: Any) -> dict[str, list[str]]:
    """Return, for each quantizer, the names of the tensors that hold its codes."""
    found: dict[str, list[str]] = {}
    for entry in json.loads(next(entry.value for entry in model.metadata_props if entry.key == CODES_KEY)):
        found.setdefault(entry["quantizer"], []).append(entry["tensor"])
    return found


def _float_layers(graph: Any, names: list[str]) -> Iterator[str]:
    in_integers = {name for node in graph.node if node.op_type in _PRODUCTS for name in node.input}
    dequantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    in_float = {dequantized.get(name, name) for node in graph.node if node.op_type in _IN_FLOAT for name in node.input}
    for name in names:
        weight = f"{name}.weight"
        if weight not in in_integers or weight in in_float:
            yield name


def _float_joins(graph: Any, codes: dict[str, list[str]], joins: dict[str, str]) -> Iterator[str]:
    makers = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    renamed: list[tuple[str, str]] = []
    for name, operator in joins.items():
        for tensor in codes.get(f"{name}.activation_post_process", ()):
            if tensor not in makers:
                renamed.append((name, operator))
                continue
            maker = makers.get(tensor)
            while maker is not None and maker.op_type in _MOVES:
                maker = makers.get(maker.input[0])
            if maker is None or maker.op_type not in (operator, "Concat" if operator == "QLinearConcat" else operator):
                yield f"{name} ({'nothing' if maker is None else maker.op_type})"
                break
            found.add(maker.output[0])
    # Where ONNX Runtime moves a quantization past a transposition, the join's codes lose their name: such a join has
    # one of the integer nodes that no other join has.
    spare = Counter(node.op_type for node in graph.node if node.output[0] not in found)
    for name, operator in renamed:
        if spare[operator] <= 0:
            yield f"{name} (nothing)"
        spare[operator] -= 1
