"""Converted models as PT2E writes them: float operators between pairs of quantize and dequantize.

PT2E is torchao's flow on exported programs. ExecuTorch's delegates and torch's Inductor match
``dequantize → operator → quantize``, operators of ``torch.ops.quantized_decomposed``, and run what stands between in
integers. A *pair* is one quantize and one dequantize of one grid. So quantizers become one pair, weights int8 behind
one dequantize, biases float constants. Operators that only move values get a pair of their input's grid behind them, as
PT2E's quantizers write it, and each reader of a tensor has a dequantize of its own.

Source: torch.ao.quantization.fx._decomposed; torchao.quantization.pt2e (``convert_pt2e``, ``DuplicateDQPass``).
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.traceback import annotate

from tritonq.deploy.embedding_tables import QuantizedEmbedding, QuantizedTable
from tritonq.deploy.modules import QuantizedLayer, QuantizedTransposed, Quantizer
from tritonq.deploy.swap import swap_modules
from tritonq.nn import Joint
from tritonq.nn.unary import UnaryLayer
from tritonq.prepare.forwards.edited import set_inner_forward
from tritonq.prepare.record.snapshot import copied

# Operators whose results are values of their input: a grid of the input is one of the result.
_MOVES = frozenset(
    f"aten.{name}"
    for name in (
        *("max_pool1d.default", "max_pool2d.default", "max_pool3d.default", "adaptive_max_pool2d.default"),
        *("view.default", "reshape.default", "flatten.using_ints", "unflatten.int", "squeeze.dim", "squeeze.dims"),
        *("unsqueeze.default", "permute.default", "transpose.int", "contiguous.default", "clone.default"),
        *("slice.Tensor", "select.int", "index_select.default", "expand.default", "dropout.default", "relu.default"),
        *("upsample_nearest2d.vec", "upsample_nearest2d.default", "pixel_shuffle.default", "channel_shuffle.default"),
    )
)
# Under this key, nodes of the two operators say which quantizer they are; torch.export saves it.
QUANTIZER_KEY = "tritonq.quantizer"
_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.uint16)


def register_pt2e_operators() -> Any:
    """Register the operators ``torch.ops.quantized_decomposed`` with torch, once, and return this namespace.

    A saved program in this form can be loaded only after this.
    """
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    return torch.ops.quantized_decomposed


class PairQuantizer(nn.Module):
    """A quantizer that traces to one ``quantize`` and one ``dequantize`` of the trained grid, float32.

    Args:
        source: the converted model's quantizer; its grid is copied.
        name: its name in the converted model, which the traced nodes have in ``meta["custom"]``.

    Attributes:
        name: of the quantizer in the converted model.

    Raises:
        ValueError: codes that none of int8, uint8, int16 and uint16 hold.
    """

    def __init__(self, source: Quantizer, name: str) -> None:
        super().__init__()
        self.name = name
        self.range = source.qtype.quant_min, source.qtype.quant_max
        self.dtype = _storage(self.range, f"the quantizer {name!r}")
        self.axis = source.qtype.axis
        if self.axis is None:
            self.scale: Any = float(source.scale)
            self.zero_point: Any = int(source.zero_point)
        else:
            self.register_buffer("scale", source.scale.clone())
            self.register_buffer("zero_point", source.zero_point.long())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(clamp(round(x / s) + z, quant_min, quant_max) - z) · s``, float32, ties to even; same shape.

        ``x`` is float32, float16 or bfloat16. One quantize and one dequantize operator run; nodes that are traced of
        them carry the quantizer's name.
        """
        with annotate({QUANTIZER_KEY: self.name}):
            return self._pair(x)

    def _pair(self, x: Tensor) -> Tensor:
        operators = torch.ops.quantized_decomposed
        rest = (*self.range, self.dtype)
        if self.axis is None:
            codes = operators.quantize_per_tensor(x, self.scale, self.zero_point, *rest)
            return cast(Tensor, operators.dequantize_per_tensor(codes, self.scale, self.zero_point, *rest))
        codes = operators.quantize_per_channel(x, self.scale, self.zero_point, self.axis, *rest)
        return cast(Tensor, operators.dequantize_per_channel(codes, self.scale, self.zero_point, self.axis, *rest))


def _storage(codes: tuple[int, int], what: str) -> torch.dtype:
    for dtype in _DTYPES:
        limits = torch.iinfo(dtype)
        if limits.min <= codes[0] and codes[1] <= limits.max and (codes[0] < 0) == (limits.min < 0):
            return dtype
    raise ValueError(f"{what} has the codes {codes[0]}..{codes[1]}; the form of PT2E holds int8, uint8, int16, uint16")


def pt2e_form(converted: nn.Module) -> nn.Module:
    """Return a copy of ``converted`` that traces to float operators between pairs of quantize and dequantize.

    Args:
        converted: a converted model whose deployed modules are Quantizers, QuantizedLayers and tables, and no others.

    Raises:
        ValueError: a quantizer or a layer's weight with codes of more than 16 bits, or a weight with codes of a float
            format or a scale per group; the message names quantizer or layer.
    """
    register_pt2e_operators()
    model = copied(converted)
    quantizers = [(name, module) for name, module in model.named_modules() if isinstance(module, Quantizer)]
    pairs: dict[nn.Module, nn.Module] = {module: PairQuantizer(module, name) for name, module in quantizers}
    for module in model.modules():
        if isinstance(module, UnaryLayer):
            module.replace_quantizers(pairs)
        elif isinstance(module, Joint):
            # Without known operands a join is the operator in float, then its quantizer.
            module.set_producers(None, None)
    model = swap_modules(model, pairs)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            _rewrite_layer(module, name)
        elif isinstance(module, QuantizedTable):
            _rewrite_table(module)
    return model


def _rewrite_layer(layer: QuantizedLayer, name: str) -> None:
    """Make a layer trace to its float operator, with a weight behind one dequantize and a float bias; changed in place.

    A weight in float, or with scales along two axes, is written as float values.

    Raises:
        ValueError: scales per group, codes of floats, or codes of more than 16 bits; the message has ``name``.
    """
    if layer.has_groups:
        raise ValueError(
            f"{name!r} has a scale per group of input channels, for which the form of PT2E has no operator"
        )
    if layer.has_floats:
        raise ValueError(f"the weight of {name!r} is rounded to floats, and the form of PT2E holds integers")
    bias, axis, scale = layer.bias, _scale_axis(layer), layer.weight_scale
    codes = None if layer.types.weight is None else (layer.types.weight.quant_min, layer.types.weight.quant_max)
    if scale is None or codes is None or axis is None:
        layer.keep(weight=layer.dequantized_weight(torch.float32), weight_scale=None, weight_zero_point=None)
        codes = None
    else:
        zero = torch.zeros_like(scale) if layer.weight_zero_point is None else layer.weight_zero_point
        weight = layer.stored_weight.to(_storage(codes, f"the weight of {name!r}"))
        layer.keep(weight=weight, weight_zero_point=zero.long())
    layer.multiplier = None
    layer.keep(bias=bias)
    layer.forward = partial(_layer_forward, layer, axis, codes)  # type: ignore[method-assign]


def _scale_axis(layer: QuantizedLayer) -> int | None:
    """Return the axis of the weight that its scales run along; None where these run along two."""
    if isinstance(layer, QuantizedTransposed):
        return 1 if layer.groups == 1 else None
    return 0


def _layer_forward(
    layer: QuantizedLayer, axis: int | None, codes: tuple[int, int] | None, input: Tensor, *computed: Tensor | None
) -> Tensor:
    weight = layer.stored_weight
    if codes is not None:
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            weight, layer.weight_scale, layer.weight_zero_point, axis, *codes, weight.dtype
        )
    return layer.finish(layer.linear_map(layer.quantized_input(input), weight, layer.stored_bias))


def _rewrite_table(table: QuantizedTable) -> None:
    if isinstance(table, QuantizedEmbedding):
        set_inner_forward(table, partial(_embedding, table))


def _embedding(table: QuantizedEmbedding, input: Tensor) -> Tensor:
    return F.embedding(input, table.dequantized_weight(), table.padding_idx, table.max_norm, table.norm_type)


def complete_pairs(program: ExportedProgram) -> None:
    """Add a pair behind each operator that moves dequantized values, and give each reader a dequantize of its own.

    The program's graph and signature are changed in place. A dequantize per channel, such as a weight's, is not copied,
    and no pair added behind what moves its values. An operator whose readers all quantize its result gets no pair. An
    output of the program shares the dequantize of the tensor's first reader. Of a node's ``meta["custom"]`` only the
    entry under ``QUANTIZER_KEY`` stays.

    Args:
        program: what ``torch.export.export`` made of a model of :func:`pt2e_form`.
    """
    operators = register_pt2e_operators()
    quantize, dequantize = operators.quantize_per_tensor.default, operators.dequantize_per_tensor.default
    graph = program.graph_module.graph
    for node in graph.nodes:
        # Without the tracer's own notes.
        noted = node.meta.pop("custom", {})
        if QUANTIZER_KEY in noted:
            node.meta["custom"] = {QUANTIZER_KEY: noted[QUANTIZER_KEY]}
    for node in list(graph.nodes):
        if str(node.target) not in _MOVES or not node.args or not _is(node.args[0], dequantize):
            continue
        if all(_is(reader, quantize) for reader in node.users):
            continue
        grid = node.args[0].args[1:]
        with graph.inserting_after(node):
            codes = graph.call_function(quantize, (node, *grid))
        with graph.inserting_after(codes):
            values = graph.call_function(dequantize, (codes, *grid))
        # Replaces itself too, hence the argument is set again.
        node.replace_all_uses_with(values)
        codes.args = (node, *grid)
        values.meta["val"] = node.meta["val"]
        codes.meta["val"] = node.meta["val"].to(grid[-1])
    for node in list(graph.nodes):
        if node.target is not dequantize:
            continue
        for reader in [reader for reader in node.users if reader.op != "output"][1:]:
            with graph.inserting_before(reader):
                own = graph.node_copy(node)
            reader.replace_input_with(node, own)
    _name_outputs_again(program)
    graph.lint()
    program.graph_module.recompile()


def _is(value: Any, target: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is target


def _name_outputs_again(program: ExportedProgram) -> None:
    """Write the names of the values that the graph returns now into the program's signature, in place."""
    output = next(node for node in program.graph_module.graph.nodes if node.op == "output")
    for spec, value in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        if isinstance(value, fx.Node) and hasattr(spec.arg, "name"):
            spec.arg.name = value.name
