"""Functions of one tensor as ONNX operators between DequantizeLinear and QuantizeLinear, which give the trained codes.

ONNX Runtime computes them in float32 and approximates exponentials, so that ties may fall otherwise than in training.
The exporter therefore runs each function of a file in ONNX Runtime on every code. If a code differs from the trained
one, a table takes the function's place, as Cast and Gather. If ONNX Runtime has one operator for the function
(`onnx_engine_functions`), that operator is tried, and written, first.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tritonq.deploy.modules import Quantizer
from tritonq.deploy.onnx_engine_functions import engine_function, put_engine_function
from tritonq.deploy.onnx_files import drop_unread
from tritonq.deploy.onnx_ops import round_half_away
from tritonq.deploy.onnx_quantizers import TracedQuantizer
from tritonq.grid import Grid
from tritonq.nn.functions import FunctionLayer, PReLU
from tritonq.quantized_type import QuantizedType
from tritonq.reference.functions import function_table

# What a function consists of in a file, beside the quantizers around it.
_OPERATOR_NAMES = """
    Abs Add Cast Clip Constant DequantizeLinear Div Elu Erf Exp Floor Gelu GreaterOrEqual HardSigmoid HardSwish Identity
    LeakyRelu Less Max Min Mish Mul Neg Pow QuantizeLinear Reciprocal Relu Sigmoid Sign Softplus Sub Tanh Where
"""
_OPERATORS = frozenset(_OPERATOR_NAMES.split())


@dataclass(frozen=True)
class CodeTable:
    """The trained codes of a function: for each code of its input that of its result, as the file holds them.

    Attributes:
        source: name in the model of the quantizer of the input.
        output: name in the model of the quantizer of the result.
        function: name of the function, such as ``"silu"``.
        codes: NumPy array, uint8; element i is the result's code for the input code i.
    """

    source: str
    output: str
    function: str
    codes: Any


def rewrite_function(layer: FunctionLayer | PReLU, output: Quantizer, quantizer: nn.Module) -> None:
    """Make a layer trace to its function in float, and then its quantizer, for a file for ONNX Runtime.

    If the output's grid rounds ties to even, QuantizeLinear divides by the scale and rounds. If it rounds ties away
    from zero, other operators divide and round, and the QuantizeLinear behind them has a scale of 1. If ``output`` is
    the child of another module, the caller puts an Identity in its place.

    Args:
        layer: a function's layer whose input and output are both quantized to integers, with one grid each; its
            forward, buffers and children are changed in place.
        output: its output quantizer.
        quantizer: the :class:`TracedQuantizer` made of ``output``, whose ``exact`` is False.
    """
    layer.activation_post_process = nn.Identity()
    layer.add_module("traced_quantizer", quantizer)
    layer.register_buffer("output_scale", output.scale.reshape(()))
    layer.forward = partial(_forward, layer, output.qtype.rounding == "half_away")  # type: ignore[method-assign]


def _forward(layer: Any, half_away: bool, input: Tensor) -> Tensor:
    y, quantizer = layer.compute(input), cast(TracedQuantizer, layer.traced_quantizer)
    return quantizer(round_half_away(y / layer.output_scale), in_steps=True) if half_away else quantizer(y)


def code_table(layer: FunctionLayer, source: TracedQuantizer, output: TracedQuantizer) -> CodeTable:
    """Return the trained codes of a function, counted as the traced quantizers of its input and output count them.

    Both quantizers must have uint8 codes, counted from 0. The table's ``codes`` hold for each code i of ``source``,
    from 0 to its ``quant_max``, ``clip(round(f((i - z_in) · s_in) / s_out) + z_out)``. Scales, zero points and the ends
    of the clip are those of the traced quantizers.
    """
    grids = []
    for end in (source, output):
        qtype = QuantizedType(0, end.quant_max, False, None, end.rounding)
        grids.append(Grid(end.scale, end.zero_point.int(), qtype))
    with torch.no_grad():
        codes = (function_table(layer.function, *grids) / output.scale).round() + output.zero_point
    bytes_of_codes = codes.clamp(output.quant_min, output.quant_max).cpu().numpy().astype(np.uint8)
    return CodeTable(source.name, output.name, layer.function.name, bytes_of_codes)


def check_functions(proto: Any, tables: list[CodeTable], codes: dict[str, list[str]]) -> None:
    """Run each function of a file in ONNX Runtime on every code, and replace those that differ from training by tables.

    A function for which ONNX Runtime has an operator of its own is written with that operator, if the operator gives
    all trained codes. Any other is replaced by a table if one of its codes is not the trained one. A function stays as
    it is if other operators stand between its input's codes and its result's, too. Nothing happens if ONNX Runtime is
    not installed.

    Args:
        proto: the file's content, an ``onnx.ModelProto``; changed in place. What nothing reads any more is deleted.
        tables: the trained codes, one table per function.
        codes: for each quantizer, by name, the names of its tensors of codes in the file.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return
    producers = {name: node for node in proto.graph.node for name in node.output}
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    for table in tables:
        for result in codes.get(table.output, ()):
            found = _between(result, set(codes.get(table.source, ())), producers, initializers)
            if found is None:
                continue
            source, nodes, constants = found
            fused = engine_function(table.function, source, result, nodes)
            if fused is not None and _gives(table.codes, source, result, fused, constants):
                put_engine_function(proto, fused)
            elif not _gives(table.codes, source, result, nodes, constants):
                _put_table(proto, source, result, producers[result], table.codes)
    drop_unread(proto.graph)


def _gives(codes: Any, source: str, result: str, nodes: list[Any], constants: list[Any]) -> bool:
    """Whether ``nodes``, run by ONNX Runtime on the codes 0, 1, 2 ..., return exactly the trained ``codes``.

    ``source`` and ``result`` are the names of their input and output; ``constants`` are those of the file.
    """
    read = {name for node in nodes for name in node.input}
    held = [constant for constant in constants if constant.name in read]
    return bool(np.array_equal(run_function(source, result, nodes, held, len(codes)), codes))


def _between(
    result: str, sources: set[str], producers: dict[str, Any], initializers: dict[str, Any]
) -> tuple[str, list[Any], list[Any]] | None:
    """Return ``(source, nodes, constants)``: of which tensor of codes a result is a function, and by which nodes.

    None if other tensors or operators than those of a function stand between.

    Args:
        result: name of the result's codes.
        sources: names of codes that may be the input.
        producers: the node that makes each tensor, by name.
        initializers: the constants, by name.
    """
    source, nodes, constants = None, [], []
    pending, seen = [result], set()
    while pending:
        name = pending.pop()
        if name in seen or not name:
            continue
        seen.add(name)
        if name in sources:
            if source not in (None, name):
                return None
            source = name
        elif name in initializers:
            constants.append(initializers[name])
        elif name not in producers or producers[name].op_type not in _OPERATORS:
            return None
        else:
            nodes.append(producers[name])
            pending += producers[name].input
    return None if source is None else (source, nodes, constants)


def run_function(source: str, result: str, nodes: list[Any], constants: list[Any], count: int) -> Any:
    """Return the codes that ONNX Runtime computes by ``nodes`` for the codes 0 to ``count - 1``: NumPy uint8 (count,).

    ``source`` and ``result`` are the names of the tensors of codes that the nodes read and make, ``constants`` the
    initializers that they read. The nodes may stand in any order, and a node may be there several times.

    Raises:
        ValueError: a node reads what is neither ``source``, a constant nor another node's result.
        ImportError: onnx or onnxruntime is not installed.
    """
    import onnx

    from tritonq.deploy.onnx_session import open_session

    shape, kind = [count], onnx.TensorProto.UINT8
    # A node that several readers share is found several times; nodes are found from the last to the first.
    unique = {node.output[0]: node for node in nodes}
    graph = onnx.helper.make_graph(
        _in_order(list(unique.values()), {source, *(constant.name for constant in constants)}),
        "function",
        [onnx.helper.make_tensor_value_info(source, kind, shape)],
        [onnx.helper.make_tensor_value_info(result, kind, shape)],
        constants,
    )
    opsets = [onnx.helper.make_opsetid(*version) for version in (("", 20), ("com.microsoft", 1))]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = open_session(model.SerializeToString())
    return session.run(None, {source: np.arange(count, dtype=np.uint8)})[0]


def _in_order(nodes: list[Any], known: set[str]) -> list[Any]:
    """Return the nodes sorted so that each stands behind those whose results it reads.

    ``known`` are the names of inputs and constants; it is changed.

    Raises:
        ValueError: a node reads what none of them makes.
    """
    ordered: list[Any] = []
    while nodes:
        ready = [node for node in nodes if all(not name or name in known for name in node.input)]
        if not ready:
            raise ValueError(f"the nodes {[node.name for node in nodes]} read what none of them makes")
        ordered += ready
        known |= {name for node in ready for name in node.output}
        nodes = [node for node in nodes if not any(node is other for other in ready)]
    return ordered


def _put_table(proto: Any, source: str, result: str, node: Any, codes: Any) -> None:
    """Replace a node: its result is read from a table at the codes of ``source``.

    Args:
        proto: the file's content; changed in place.
        source: name of the input's codes.
        result: name of the result's codes.
        node: the node that makes the result, which is removed.
        codes: the table, uint8: element i is the result's code for the input code i.
    """
    import onnx

    graph = proto.graph
    table, index = f"{result}.table", f"{result}.index"
    graph.initializer.append(onnx.numpy_helper.from_array(codes, table))
    made = [
        onnx.helper.make_node("Cast", [source], [index], to=onnx.TensorProto.INT32),
        onnx.helper.make_node("Gather", [table, index], [result]),
    ]
    position = next(place for place, other in enumerate(graph.node) if other is node or other == node)
    del graph.node[position]
    for offset, new in enumerate(made):
        graph.node.insert(position + offset, new)
