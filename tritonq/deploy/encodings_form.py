"""A converted model rewritten for tracing without quantizers: grids are marked, between them stand float operators.

A *mark* is a node of a domain of its own, which no optimiser removes. :func:`take_marks` finds by it the tensor in the
file that has each grid, and removes it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.deploy.embedding_tables import QuantizedTable
from tritonq.deploy.modules import DeployedModule, QuantizedLayer, QuantizedTransposed, Quantizer
from tritonq.deploy.onnx_average_pool import rewrite_global_average
from tritonq.deploy.onnx_joins import rewrite_join
from tritonq.deploy.onnx_moves import moves_values
from tritonq.deploy.onnx_tables import rewrite_table
from tritonq.deploy.swap import swap_modules
from tritonq.nn import AverageLayer, Joint
from tritonq.nn.unary import UnaryLayer
from tritonq.prepare.record.snapshot import copied
from tritonq.quantized_type import QuantizedType

_MARK = "tritonq::Marked"
_DOMAIN = "tritonq"
_BIAS = QuantizedType.of(32)


@dataclass(frozen=True)
class Encoding:
    """The grid of a tensor: ``value = (code - zero_point) · scale``.

    Attributes:
        scale: one number per channel, or one.
        zero_point: as many codes as there are scales.
        qtype: range of codes and the axis that the scales lie along; axis None for one scale.
    """

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    qtype: QuantizedType


def marked(x: Tensor, name: str) -> Tensor:
    """Return ``x`` with a mark called ``name`` in the traced graph; :func:`encodings_form` tells the mark's grid.

    For tracing only: called outside of a trace it returns zeros, in the shape and dtype of ``x``.
    """
    return torch.onnx.ops.symbolic(_MARK, (x,), {"name": name}, dtype=x.dtype, shape=x.shape, version=1)


class _Mark(nn.Module):
    """Takes the place of a quantizer in a model that is traced: marks its input instead of rounding it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return marked(x, self.name)


def encodings_form(converted: nn.Module) -> tuple[nn.Module, dict[str, Encoding]]:
    """Return a copy of a converted model that traces to marks and float operators, and the grids by the marks' names.

    In the copy quantizers mark their input and return it; layers multiply by the float values of their codes and mark
    weight and bias, which lie on their grids, if these are quantized. A mark is called as its quantizer, such as
    ``"0.activation_post_process"``, or as its parameter, such as ``"0.weight"``.

    Warns:
        UserWarning: embedding tables, whose rows have a scale each: they get no encoding.

    Raises:
        ValueError: a grid that an :class:`Encoding` can't hold: float codes, a code range of no whole number of bits
            (-127..127 counts as 8), scales per group, or several scales of a grouped transposed convolution; or a
            recurrent or fixed-point layer. The message names it.
    """
    model = copied(converted)
    encodings: dict[str, Encoding] = {}
    traced: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            encodings[name] = _encoding(name, module.scale, module.zero_point, module.qtype)
            traced[module] = _Mark(name)
        elif isinstance(module, DeployedModule) and not isinstance(module, (QuantizedLayer, QuantizedTable)):
            raise ValueError(f"{type(module).__name__} {name!r} has no form in a file with encodings")
    for module in model.modules():
        if isinstance(module, Joint):
            module.replace_producers(traced)
        elif isinstance(module, UnaryLayer):
            module.replace_quantizers(traced)
    model = swap_modules(model, traced)
    tables: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Joint):
            rewrite_join(module, None)
        elif isinstance(module, AverageLayer):
            rewrite_global_average(module)
        elif isinstance(module, QuantizedLayer):
            encodings |= _mark_layer(module, name)
        elif isinstance(module, QuantizedTable):
            rewrite_table(module, in_float=True)
            tables.append(name)
    if tables:
        warnings.warn(
            f"embedding tables have a scale per row, which encodings don't describe; in float: {', '.join(tables)}",
            stacklevel=3,
        )
    return model, encodings


def _encoding(name: str, scale: Tensor, zero_point: Tensor | None, qtype: QuantizedType) -> Encoding:
    if qtype.float_format is not None:
        raise ValueError(f"{name!r} has the codes of {qtype.codes}, and encodings describe integers alone")
    bits = qtype.bits
    whole = QuantizedType.of(bits, signed=qtype.signed)
    allowed = {(whole.quant_min, whole.quant_max), (whole.quant_min + int(qtype.signed), whole.quant_max)}
    if (qtype.quant_min, qtype.quant_max) not in allowed:
        raise ValueError(
            f"{name!r} has the codes {qtype.quant_min}..{qtype.quant_max}, which are no range of whole bits, as "
            "encodings describe"
        )
    zero = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
    return Encoding(tuple(scale.reshape(-1).tolist()), tuple(zero.reshape(-1).tolist()), qtype)


def _mark_layer(layer: QuantizedLayer, name: str) -> dict[str, Encoding]:
    """Make a layer trace to its float operation with marks at weight and bias; return the grids of these marks.

    The layer called ``name`` is changed in place: its weight and bias become floats.

    Raises:
        ValueError: scales per group, or of a grouped transposed convolution, or weights in a float format.
    """
    encodings: dict[str, Encoding] = {}
    scale, qtype = layer.weight_scale, layer.types.weight
    if scale is not None and qtype is not None:
        if layer.has_groups:
            raise ValueError(f"{name!r} has a scale per group of input channels, which this version's encodings lack")
        if layer.has_floats:
            raise ValueError(f"the weight of {name!r} is rounded to {qtype.codes}, and encodings describe integers")
        zero = layer.weight_zero_point
        is_one = bool((scale == scale[0]).all()) and (zero is None or bool((zero == zero[0]).all()))
        axis: int | None = 1 if isinstance(layer, QuantizedTransposed) else 0
        if axis == 1 and layer.groups != 1 and not is_one:
            raise ValueError(
                f"{name!r}: the scales of a grouped transposed convolution run along two axes, which encodings don't "
                "describe: give it one scale for its weight"
            )
        if qtype.axis is None and is_one:
            scale, zero, axis = scale[:1], None if zero is None else zero[:1], None
        grid = QuantizedType(qtype.quant_min, qtype.quant_max, qtype.symmetric, axis)
        encodings[f"{name}.weight"] = _encoding(f"{name}.weight", scale, zero, grid)
    weight, bias, unit = layer.dequantized_weight(torch.float32), layer.stored_bias, layer.multiplier
    if bias is not None and unit is not None:
        bias = (bias.double() * unit.double()).float()
        grid = QuantizedType(_BIAS.quant_min, _BIAS.quant_max, axis=0)
        encodings[f"{name}.bias"] = _encoding(f"{name}.bias", unit, None, grid)
    # Float from here on; the buffers of grids would otherwise be read again.
    layer.multiplier = layer.weight_scale = layer.weight_zero_point = None
    layer.keep(weight=weight, bias=bias)
    layer.forward = partial(_layer_forward, layer, name, frozenset(encodings))  # type: ignore[method-assign]
    return encodings


def _layer_forward(layer: QuantizedLayer, name: str, marks: frozenset[str], x: Tensor, *_: Tensor | None) -> Tensor:
    weight, bias = layer.stored_weight, layer.stored_bias
    if f"{name}.weight" in marks:
        weight = marked(weight, f"{name}.weight")
    if bias is not None and f"{name}.bias" in marks:
        bias = marked(bias, f"{name}.bias")
    x = layer.quantized_input(x)
    if isinstance(layer, nn.Linear) and x.dim() > 2:
        # A matrix, so that the file holds a Gemm with the weight as it is, and no MatMul with its transpose.
        y = layer.finish(layer.linear_map(x.flatten(0, -2), weight, bias))
        return torch.unflatten(y, 0, x.shape[:-1])
    return layer.finish(layer.linear_map(x, weight, bias))


def take_marks(graph: Any, encodings: dict[str, Encoding]) -> dict[str, Encoding]:
    """Remove the marks from a traced graph; return the grids by the names of its tensors, in order of execution.

    If a tensor has two grids, those that read it on the second one read it through an Identity, whose result gets that
    grid; so do those that read it on its only grid, if others read it unrounded. A marked initializer gets the name of
    its mark, if no tensor has that name. Tensors without a mark get a grid, if it has one scale, in two cases: the
    result of a ReLU, or of an operation that only moves values, gets that of its input (of a concatenation, if all
    inputs have the same); the input of an operation that moves values gets that of the result, if another node computes
    the input and nothing else reads it (not for Split and Resize).

    Args:
        graph: an ``onnx_ir.Graph``; changed in place.
        encodings: the grids by the names of the marks.
    """
    found: dict[Any, Encoding] = {}
    names = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    names |= {value.name for value in graph.inputs}
    for node in list(graph):
        if node.domain == _DOMAIN and node.op_type == "Marked":
            _take_mark(graph, node, encodings, found, names)
    for node in graph:
        _hand_on(node, found)
    for node in reversed(graph):
        _hand_back(node, found)
    order = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return {value.name: found[value] for value in order if value in found}


def _take_mark(
    graph: Any, node: Any, encodings: dict[str, Encoding], found: dict[Any, Encoding], names: set[str]
) -> None:
    import onnx_ir as ir

    value, result = node.inputs[0], node.outputs[0]
    name = node.attributes["name"].as_string()
    encoding = encodings[name]
    is_fixed = value.is_graph_input() or value.is_initializer() or value.is_graph_output()
    readers = [user for user, _ in value.uses() if user is not node]
    others = [user for user in readers if not (user.domain == _DOMAIN and user.op_type == "Marked")]
    is_shared = value in found and found[value] != encoding
    if is_shared or (value not in found and others) or (result.is_graph_output() and is_fixed):
        identity = ir.node("Identity", [value], name=node.name)
        identity.outputs[0].shape, identity.outputs[0].dtype = result.shape, result.dtype
        graph.insert_before(node, identity)
        value = identity.outputs[0]
        value.name = None if result.is_graph_output() else result.name
    found[value] = encoding
    if value.is_initializer() and name not in names:
        names.add(name)
        value.name = name
    if result.is_graph_output():
        kept = result.name
        for index, output in enumerate(graph.outputs):
            if output is result:
                graph.outputs[index] = value
        result.name = None
        value.name = kept
    for reader, index in list(result.uses()):
        reader.replace_input_with(index, value)
    graph.remove(node, safe=True)


def _hand_on(node: Any, found: dict[Any, Encoding]) -> None:
    """Note for the results of an operation that moves values, or a ReLU, the grid of its input."""
    if not (moves_values(node) or node.op_type == "Relu"):
        return
    sources = [found.get(value) for value in (node.inputs if node.op_type == "Concat" else node.inputs[:1])]
    first = sources[0]
    if first is None or first.qtype.axis is not None or any(source != first for source in sources):
        return
    for value in node.outputs if node.op_type == "Split" else node.outputs[:1]:
        found.setdefault(value, first)


def _hand_back(node: Any, found: dict[Any, Encoding]) -> None:
    """Note for the input of an operation that only moves values the grid of its result, if nothing else reads it.

    Rounding before such an operation gives the same values as rounding behind it.
    """
    if not moves_values(node) or node.op_type in ("Split", "Resize") or node.outputs[0] not in found:
        return
    encoding = found[node.outputs[0]]
    for value in node.inputs if node.op_type == "Concat" else node.inputs[:1]:
        is_computed = value.producer() is not None and not value.is_graph_output()
        if encoding.qtype.axis is None and is_computed and len(value.uses()) == 1:
            found.setdefault(value, encoding)
