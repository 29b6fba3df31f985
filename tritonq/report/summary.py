"""The table of what became of every layer of a prepared or converted model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from textwrap import wrap

from torch import nn

from tritonq.deploy.embedding_tables import QuantizedTable
from tritonq.deploy.fixed_point_modules import IntegerAdd, IntegerAvgPool2d
from tritonq.deploy.float_quantizer import FloatQuantizer
from tritonq.deploy.modules import DeployedModule, QuantizedLayer, Quantizer
from tritonq.deploy.phases import phases_of_kernel
from tritonq.deploy.recurrent import QuantizedRecurrent
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.nn import Cat, Embedding, EmbeddingBag, FloatFunctional, Joint, QATLayer, QATRecurrent
from tritonq.nn.compile_wrapper import uncompiled
from tritonq.nn.fixed_point_layer import FixedPointLayer
from tritonq.nn.recurrent_forward import is_weight_quantizer
from tritonq.nn.reference import references_of
from tritonq.nn.unary import UnaryLayer
from tritonq.observers import ObserverBase
from tritonq.prepare.changes import report_of, silence_references
from tritonq.prepare.decide.layer_records import LayerRecord, Part, Status, counts, part_of_module
from tritonq.prepare.record.operations import is_leaf
from tritonq.quantized_type import QuantizedType
from tritonq.report.table import WIDTH, text_table
from tritonq.targets import find_target

_JOINS = (Joint, Cat, FloatFunctional, IntegerAdd)
_OTHERS = (UnaryLayer, IntegerAvgPool2d, FloatQuantizer)
_QUANTIZED = (QATLayer, QATRecurrent, FixedPointLayer, DeployedModule, Embedding, EmbeddingBag, *_JOINS, *_OTHERS)
# What a quantizer says about a layer, by the name of the child that holds it.
_ROLES = {"weight_fake_quant": "w", "activation_post_process": "y", "input_fake_quant": "x"}
_UNSEEN = " (no data yet)"
_HEADER = ("layer", "kind", "fused with", "status", "grid, or why in float")


@dataclass(frozen=True)
class LayerSummary:
    """What became of one layer.

    Attributes:
        name: qualified name.
        kind: class name in the float model, or the operation. A model without a record of its preparation has the class
            name of its own module, such as ``"QuantizedConv2d"``.
        fused_with: names of the modules that became one layer with it.
        grid: ranges of codes of its weight (w), output (y) and input (x), such as ``"w -127..127 per channel, y
            0..255"``; "" if it has no quantizer of its own. A layer that computes in float, because its input lies on
            no known grid, has ``x float``.
            ``"(off)"`` follows the codes of a quantizer that is switched off, ``"(no data yet)"`` of one that
            saw at most the example inputs.
        status: ``"quantized"``; ``"float"``; or ``"moves values"`` of a module that leaves values as they are, so
            that codes stay codes (Flatten, max pooling, Dropout, …). Functions that do so are not listed.
        reason: why it is in float, or why the engine that it was prepared for runs it in float; or "".
        part: ``"layer"`` if it has weights and is no part of another layer; ``"join"`` of an operation on several
            activations; ``"other"`` of any other operation, and of what became part of a layer.
    """

    name: str
    kind: str
    fused_with: tuple[str, ...]
    grid: str
    status: Status
    reason: str
    part: Part


@dataclass(frozen=True)
class ModelSummary:
    """What became of every layer of a model, from :func:`summary`; ``print`` it for a table of at most 120 columns.

    Attributes:
        model: class name of the model.
        layers: every layer, in order of use; what was fused into another follows as a layer of its own.
        absorbed: names of the layers that are part of another one and have no row of their own in the table.
        quantizers: name and grid, as in :class:`LayerSummary`, of each activation quantizer that is in no layer's row.

    Examples:
        >>> import torch, tritonq
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Softmax(1))
        >>> found = summary(tritonq.prepare_qat(model, example_inputs=torch.randn(1, 1, 8, 8)))
        >>> [layer.name for layer in found.quantized], [layer.name for layer in found.in_float]
        (['0'], ['2'])
    """

    model: str
    layers: tuple[LayerSummary, ...]
    absorbed: frozenset[str]
    quantizers: tuple[tuple[str, str], ...]

    @property
    def quantized(self) -> tuple[LayerSummary, ...]:
        """The layers and operations that are quantized; ``fused_with`` names what became part of each."""
        return tuple(layer for layer in self._rows() if layer.status == "quantized")

    @property
    def in_float(self) -> tuple[LayerSummary, ...]:
        """The layers and operations that stay in float; ``reason`` says why."""
        return tuple(layer for layer in self._rows() if layer.status == "float")

    @property
    def moving(self) -> tuple[LayerSummary, ...]:
        """The modules that leave values as they are, such as Flatten and max pooling, so that codes stay codes."""
        return tuple(layer for layer in self._rows() if layer.status == "moves values")

    def _rows(self) -> Iterator[LayerSummary]:
        return (layer for layer in self.layers if layer.name not in self.absorbed)

    def __str__(self) -> str:
        lines = text_table([_HEADER, *map(_cells, self._rows())])
        if self.quantizers:
            lines += ["", *text_table([("further tensors on a grid", "grid"), *self.quantizers])]
        return "\n".join([*lines, "", *wrap(self.line, WIDTH)])

    def _repr_html_(self) -> str:
        """Return the table as HTML, which notebooks show."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in _HEADER)
        rows = "".join(
            "<tr>" + "".join(f'<td style="text-align: left">{escape(cell)}</td>' for cell in _cells(layer)) + "</tr>"
            for layer in self._rows()
        )
        further = "".join(f"<li><code>{escape(name)}</code> {escape(grid)}</li>" for name, grid in self.quantizers)
        listed = f"<p>further tensors on a grid:</p><ul>{further}</ul>" if further else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return f"{table}{listed}<p>{escape(self.line)}</p>"

    @property
    def line(self) -> str:
        """The counts as one line of text.

        Such as ``"Net: quantized 5 of 5 layers, 1 of 1 joins (5 Conv2d, 1 add), 8 more fused into them, 1 left in
        float"``; ``prepare_qat`` logs the first two counts.
        """
        kinds = Counter(layer.kind for layer in self.quantized)
        parts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        moving = f"{len(self.moving)} that only move values, " if self.moving else ""
        others = sum(layer.part == "other" for layer in self.quantized)
        more = f", {others} other operations" if others else ""
        return (
            f"{self.model}: {counts(tuple(self._rows()))}{more} ({parts}), {len(self.absorbed)} more fused into "
            f"them, {moving}{len(self.in_float)} left in float"
        )


def summary(model: nn.Module) -> ModelSummary:
    """Return a table of the layers of a prepared or converted model: quantized, fused, or in float and why.

    A model prepared with ``example_inputs`` carries a record of it, which copies, pickles and conversion keep. Any
    other one (torch.ao's flow, quantized modules by hand, ``load_converted``) is described from its modules.

    Raises:
        TypeError: not a module.
        ValueError: a float model.

    Examples:
        >>> import torch, tritonq
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Softmax(1))
        >>> prepared = tritonq.prepare_qat(model, example_inputs=torch.randn(1, 1, 8, 8))
        >>> print(summary(prepared).line)
        Sequential: quantized 1 of 1 layers, 0 of 0 joins (1 Conv2d), 2 more fused into them, 1 left in float
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
    model = uncompiled(model)
    if not any(isinstance(module, (*_QUANTIZED, FakeQuantizeBase)) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is a float model: nothing in it is quantized; call prepare_qat first")
    modules = dict(model.named_modules())
    silence_references(model)
    recorded = report_of(model)
    records = tuple(_from_modules(model)) if recorded is None else recorded
    layers = tuple(_layer(record, modules.get(record.name)) for record in records)
    heads = {name for name, module in modules.items() if isinstance(module, _QUANTIZED)}
    absorbed = frozenset(
        layer.name
        for layer in layers
        if layer.status == "quantized" and layer.fused_with and layer.name not in heads and not layer.grid
    )
    shown = {layer.name for layer in layers if layer.grid}
    return ModelSummary(type(model).__name__, layers, absorbed, tuple(_further(modules, shown)))


def describe_grid(qtype: QuantizedType) -> str:
    """Return a quantized type in a few words: ``"-127..127 per channel"``, ``"-8..7 per group of 32"``.

    A type per tensor gives its codes only, such as ``"0..255"`` or ``"e4m3"``.
    """
    codes = f"{qtype.quant_min}..{qtype.quant_max}" if qtype.float_format is None else qtype.codes
    per = " per channel" if qtype.group is None else f" per group of {qtype.group}"
    return codes + ("" if qtype.axis is None else per)


def _cells(layer: LayerSummary) -> tuple[str, ...]:
    fused = ", ".join(layer.fused_with) or "-"
    told = "; ".join(text for text in (layer.grid, layer.reason) if text)
    return layer.name, layer.kind, fused, layer.status, told or "-"


def _layer(record: LayerRecord, module: nn.Module | None) -> LayerSummary:
    grid = "" if module is None else _grid(module)
    reason = record.reason
    if record.status == "quantized" and module is not None:
        reason = reason or _why_not_on_grid(module) or _why_float_in_engine(module)
    return LayerSummary(record.name, record.kind, record.fused_with, grid, record.status, reason, record.part)


def _why_not_on_grid(module: nn.Module) -> str:
    """Return why a layer or join computes in float since its model was changed; "" where it was not."""
    held = [reference for part in module.modules() for reference in references_of(part)]
    changes = dict.fromkeys(change for reference in held if (change := reference.change) is not None)
    return f"computes in float: after prepare_qat {'; '.join(changes)}" if changes else ""


def _why_float_in_engine(module: nn.Module) -> str:
    """Return why ONNX Runtime computes a quantized layer in float, if it was prepared for it; "" if it does not.

    Reasons are that no quantizer follows at once, or that a transposed convolution pads by as much as its kernel.
    """
    if isinstance(module, QATLayer):
        target, has_weight = module.qconfig.target, isinstance(module.weight_fake_quant, FakeQuantizeBase)
    elif isinstance(module, QuantizedLayer):
        target, has_weight = module.target, module.types.weight is not None
    else:
        return ""
    if find_target(target).onnx != "onnxruntime" or not has_weight or _reads_float(module):
        return ""
    if not isinstance(module.last_quantizer(module.activation_post_process), (FakeQuantizeBase, Quantizer)):
        return "float in ONNX Runtime: no quantizer follows at once"
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and phases_of_kernel(module) is None:
        return "float in ONNX Runtime: it pads by as much as its kernel, or more"
    return ""


def _grid(module: nn.Module) -> str:
    """Return the grids of a layer's own quantizers as text: ``"w -127..127 per channel, y 0..255"``."""
    parts: dict[str, str] = {}
    if isinstance(module, QuantizedLayer) and module.types.weight is not None:
        parts["w"] = describe_grid(module.types.weight) + (" per channel" if module.types.weight.axis is None else "")
    if isinstance(module, QATRecurrent):
        parts["w"] = _weights_grid(module)
    if isinstance(module, QuantizedRecurrent):
        known = [describe_grid(grid) for grid in module.types.values() if grid is not None]
        parts |= {"w": known[0]} if known else {}
    if isinstance(module, QuantizedTable):
        parts["w"] = describe_grid(module.qtype)
    for name, role in _ROLES.items():
        quantizer = getattr(module, name, None)
        if isinstance(quantizer, (FakeQuantizeBase, Quantizer)):
            parts[role] = _quantizer_grid(quantizer)
        elif isinstance(quantizer, FloatFakeQuantize):
            parts[role] = quantizer.format
    has_floats = isinstance(getattr(module, "weight_fake_quant", None), FloatFakeQuantize)
    if "x" not in parts and not has_floats and _reads_float(module):
        parts["x"] = "float"
    for name, child in module.named_children():
        if name not in _ROLES and isinstance(child, FakeQuantizeBase) and isinstance(module, FixedPointLayer):
            parts[name] = _quantizer_grid(child)
    text = ", ".join(f"{role} {grid}" for role, grid in parts.items())
    if len(parts) > 1 and all(grid.endswith(_UNSEEN) for grid in parts.values()):
        return text.replace(_UNSEEN, "") + _UNSEEN
    return text


def _weights_grid(layer: QATRecurrent) -> str:
    """Return the grid of a recurrent layer's first weight, as text; all its weights have one qconfig."""
    quantizer = next(child for name, child in layer.named_children() if is_weight_quantizer(name))
    if isinstance(quantizer, FloatFakeQuantize):
        return quantizer.format
    return _quantizer_grid(quantizer) if isinstance(quantizer, FakeQuantizeBase) else "float"


def _reads_float(module: nn.Module) -> bool:
    """Whether a layer with a quantized weight computes in float because its input lies on no known grid."""
    if isinstance(module, QuantizedLayer):
        return module.types.weight is not None and module.types.input is None
    return isinstance(module, QATLayer) and module.input_quantizer is None


def _quantizer_grid(quantizer: nn.Module) -> str:
    grid = describe_grid(quantizer.qtype)  # type: ignore[arg-type]
    if isinstance(quantizer, FakeQuantizeBase):
        if not bool(quantizer.fake_quant_enabled):
            return f"{grid} (off)"
        if not quantizer.has_qparams() or quantizer.rests_on_examples():
            return grid + _UNSEEN
    return grid


def _further(modules: dict[str, nn.Module], shown: set[str]) -> Iterator[tuple[str, str]]:
    """Yield name and grid of each activation quantizer that is in no layer's row."""
    outer: set[str] = set()
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if not isinstance(module, (FakeQuantizeBase, Quantizer)) or parent in outer:
            continue
        outer.add(name)
        if not (child in _ROLES and parent in shown) and not is_weight_quantizer(name):
            owner = parent if child == "activation_post_process" else name
            yield owner or "the model's output", _quantizer_grid(module)


def _from_modules(model: nn.Module) -> Iterator[LayerRecord]:
    """Yield records of the layers of a model that has none, from its modules."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside) or isinstance(module, (FakeQuantizeBase, Quantizer)):
            inside.append(name)
            continue
        if isinstance(module, _QUANTIZED):
            inside.append(name)
            yield LayerRecord(name, type(module).__name__, (), "quantized", "", _part(module))
        elif is_leaf(module) and not isinstance(module, (nn.Identity, ObserverBase)):
            yield LayerRecord(name, type(module).__name__, (), "float", _reason(module), part_of_module(module))


def _part(module: nn.Module) -> Part:
    """Return what a quantized module counts as: ``"layer"``, ``"join"`` or ``"other"``."""
    if isinstance(module, _OTHERS):
        return "other"
    return "join" if isinstance(module, _JOINS) else "layer"


def _reason(module: nn.Module) -> str:
    if "qconfig" in vars(module) and vars(module)["qconfig"] is None:
        return "its qconfig is None"
    return f"no quantized module took the place of {type(module).__name__}"
