"""Say for each layer of a prepared model what became of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm

from tritonq.nn.original_class import original_class
from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.called_layers import FUNCTIONS_WITH_WEIGHTS
from tritonq.prepare.decide.find_layers import why_uncalled
from tritonq.prepare.decide.fixed_point import Links
from tritonq.prepare.decide.float_operations import float_operations, why_between
from tritonq.prepare.decide.joins import Join
from tritonq.prepare.decide.layers import Layer
from tritonq.prepare.decide.plan import Plan
from tritonq.prepare.decide.unary import QUANTIZED_FORMS
from tritonq.prepare.record.dataflow import Call, ValueIndex

WITHOUT_COMPUTATION = (nn.Identity, nn.Sequential, nn.ParameterList, nn.ParameterDict)
Status = Literal["quantized", "moves values", "float"]
Part = Literal["layer", "join", "other"]
_WEIGHTED = (
    *(nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag),
    *(nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase),
)


@dataclass(frozen=True)
class LayerRecord:
    """What became of one layer of the float model.

    Attributes:
        name: qualified name in the float model; for an operation that of its new module, or in float, such as
            ``"block.add_1"``, that of the module whose forward calls it, the operation and a number to tell them apart.
        kind: class name of the layer such as ``"Conv2d"``, or name of the operation such as ``"add"``.
        fused_with: qualified names of the modules that became one layer with it, such as its BatchNorm and ReLU.
        status: ``"quantized"``; ``"float"``; or ``"moves values"`` for a module that returns only values of its input
            and 0, so that codes stay codes (max pool, dropout, a ReLU that became part of nothing, …).
        reason: why it is in float, or "".
        part: what it counts as. ``"layer"``: it has weights and is no part of another layer; ``"join"``: an operation
            on several activations; ``"other"``: any other operation, such as a function of one tensor, arithmetic with
            a number or a constant, and what became part of a layer.

    Examples:
        >>> record = LayerRecord("stem.0", "Conv2d", ("stem.1",), "quantized", "")
        >>> record.part, counts([record])
        ('layer', 'quantized 1 of 1 layers, 0 of 0 joins')
    """

    name: str
    kind: str
    fused_with: tuple[str, ...]
    status: Status
    reason: str
    part: Part = "layer"


def layer_records(
    analysis: Analysis, plan: Plan, join_names: Mapping[Join, str], unary_names: Mapping[ValueIndex, str]
) -> tuple[LayerRecord, ...]:
    """Return a record for each layer of the float model, addition and the like, in order of their first call.

    Layers that no run calls come last, in order of the modules.

    Args:
        analysis: the model and its record.
        plan: the plan that was carried out.
        join_names: qualified name of the module that each join became.
        unary_names: qualified name of the module that each operation of one tensor in a forward became, by the index
            of the value that its quantizer rounds, the key into ``plan.unary``.
    """
    calls = analysis.flow.calls
    partners: dict[str, list[str]] = {}

    def pair(name: str, absorbed: Iterable[str | None]) -> None:
        for other in dict.fromkeys(other for other in absorbed if other is not None):
            partners.setdefault(name, []).append(other)
            partners.setdefault(other, []).append(name)

    parts: tuple[Layer | Join, ...] = (*plan.layers, *plan.joins)
    for part in parts:
        name = part.name if isinstance(part, Layer) else join_names[part]
        absorbed = [calls[index].module_name for index in part.relus]
        absorbed.append(part.batch_norm if isinstance(part, Layer) else None)
        absorbed += _holders(part, analysis, plan) if isinstance(part, Layer) else ()
        pair(name, absorbed)
    for place in plan.quantizers:
        if place.value in plan.unary:
            name = unary_names.get(place.value, place.owner)
            pair(name, [calls[index].module_name for index in plan.unary[place.value].absorbed])
    found: list[tuple[float, LayerRecord]] = []

    def note(
        first: float, name: str, kind: str, reason: str = "", part: Part = "other", status: Status | None = None
    ) -> None:
        status = status or ("float" if reason else "quantized")
        found.append((first, LayerRecord(name, kind, tuple(partners.get(name, ())), status, reason, part)))

    quantized = {layer.name for layer in plan.layers}
    quantized |= {place.owner for place in plan.quantizers if place.value in plan.unary and place.where == "output"}
    scripted = tuple(f"{name}." for name, module in analysis.modules.items() if isinstance(module, ScriptModule))
    for name, module in analysis.modules.items():
        if name not in analysis.leaves and not isinstance(module, _BatchNorm) and name not in partners:
            continue
        if type(module) in WITHOUT_COMPUTATION or name.startswith(scripted):
            continue
        whole = name in quantized or (name in partners and _absorbed(name, analysis, plan))
        kind = str(module.original_name) if isinstance(module, ScriptModule) else type(module).__name__
        first = _first_call(name, analysis)
        if not whole and _moves_values(name, analysis, plan):
            note(first, name, kind, status="moves values")
        else:
            counted = "other" if name in partners and name not in quantized else part_of_module(module)
            note(first, name, kind, "" if whole else _reason(name, module, analysis, plan), counted)
    for layer in plan.layers:
        if layer.function is not None:
            note(layer.calls[0], layer.name, layer.function.calls[0].name, part="layer")
    for join in plan.joins:
        note(join.calls[0], join_names[join], join.kind, part="join")
    for value, name in unary_names.items():
        note(plan.unary[value].calls[0], name, calls[plan.unary[value].calls[0]].name)
    names = {record.name for _, record in found}
    for name, reason in plan.float_reasons.items():
        if name not in names:
            function = plan.float_functions.get(name)
            first = math.inf if function is None else function.index
            kind = name.rpartition(".")[2] if function is None else function.name
            has_weights = kind in FUNCTIONS_WITH_WEIGHTS
            if function is None and name in analysis.modules:
                has_weights = part_of_module(analysis.modules[name]) == "layer"
            note(first, name, kind, reason, "layer" if has_weights else "other")
            names.add(name)
    for join, reason in plan.float_joins:
        free = _free_name(f"{join.owner}.{join.kind}".lstrip("."), names)
        note(join.calls[0], free, join.kind, reason, "join")
        names.add(free)
    for call in float_operations(analysis, plan):
        free = _free_name(f"{call.owner}.{call.name}".lstrip("."), names)
        note(call.index, free, call.name, why_between(call, analysis))
        names.add(free)
    in_order = sorted(found, key=lambda pair: pair[0])
    inner = tuple(f"{record.name}." for _, record in found if record.part == "layer" and record.status == "float")
    records = (replace(item, part="other") if item.name.startswith(inner) else item for _, item in in_order)
    return tuple(dict.fromkeys(records))


def part_of_module(module: nn.Module) -> Part:
    """Return what a module of a float model counts as: ``"layer"`` if it is a layer with weights, else ``"other"``.

    Layers with weights are convolutions, ``nn.Linear``, ``nn.Bilinear``, embeddings, ``nn.MultiheadAttention``,
    recurrent layers and cells, subclasses of these, and a ScriptModule with parameters. Norms and PReLU are "other".
    """
    if isinstance(module, ScriptModule):
        return "other" if next(module.parameters(), None) is None else "layer"
    return "layer" if isinstance(module, _WEIGHTED) else "other"


class Counted(Protocol):
    """Has the properties that :func:`counts` reads to count quantized layers and joins, as a `LayerRecord` has."""

    @property
    def part(self) -> Part:
        """The number in which it counts, "layer" (with a weight) or "join" (several operands); "other" for none."""

    @property
    def status(self) -> Status:
        """What became of it, "quantized", "moves values" or "float"."""


def counts(records: Sequence[Counted]) -> str:
    """Return how many layers and joins are quantized: ``"quantized 5 of 5 layers, 2 of 3 joins"``."""
    layers, joins = ([record for record in records if record.part == part] for part in ("layer", "join"))
    quantized = (sum(record.status == "quantized" for record in part) for part in (layers, joins))
    return f"quantized {next(quantized)} of {len(layers)} layers, {next(quantized)} of {len(joins)} joins"


def _first_call(name: str, analysis: Analysis) -> float:
    """Return the index of the first call of a module, or of a call in its forward; infinity if there is none."""
    own = [call.index for call in analysis.flow.calls_of(name)]
    events = [analysis.flow.first_call_in(frame) for frame in analysis.flow.frames_of(name)]
    outer = name.rpartition(".")[0]
    if outer and not own and not events:
        return _first_call(outer, analysis)  # part of a module that runs as a whole
    return min([*own, *(first for first in events if first is not None)], default=math.inf)


def _free_name(base: str, taken: Container[str]) -> str:
    """Return the first name among ``base``, ``base_1``, ``base_2`` and so on that is not in ``taken``."""
    names = (f"{base}_{count}" if count else base for count in itertools.count())
    return next(name for name in names if name not in taken)


def fixed_point_records(links: Links) -> tuple[LayerRecord, ...]:
    """Return a record for each layer, then each addition and each average pooling, of a fixed-point network.

    ``links`` is what :func:`find_links` found of it. All are "quantized". Parts: "layer", "join" for additions, "other"
    for poolings.
    """
    records = []
    for layer in links.layers.values():
        kind = layer.row[0].__name__
        fused = () if layer.batch_norm is None else (layer.batch_norm,)
        records.append(LayerRecord(layer.name, kind, fused, "quantized", "", "layer"))
    others: list[tuple[Call, Part]] = [(call, "join") for call in links.additions.values()]
    others += [(pooling.call, "other") for pooling in links.poolings.values()]
    for call, part in others:
        name = call.module_name or f"{call.owner}.{call.name}".lstrip(".")
        records.append(LayerRecord(name, call.name, (), "quantized", "", part))
    return tuple(records)


def _absorbed(name: str, analysis: Analysis, plan: Plan) -> bool:
    """Whether a BatchNorm or ReLU, given by name, became part of something else in every call."""
    if any(layer.batch_norm == name for layer in plan.layers):
        return True
    return all(call.index in plan.erased for call in analysis.flow.calls_of(name))


def _holders(layer: Layer, analysis: Analysis, plan: Plan) -> list[str]:
    """Return names of the modules that only hold the parameters of a layer that is a function: nothing calls them."""
    state = () if layer.function is None else layer.function.program.state.values()
    found = dict.fromkeys(name.rpartition(".")[0] for name in state)
    return [name for name in found if name in plan.float_reasons and not analysis.flow.runs_of(name)]


def _moves_values(name: str, analysis: Analysis, plan: Plan) -> bool:
    """Whether every call of the module ``name`` returns only values of its input, so that its record is "moves values".

    False for a module that is never called, or that the plan has a reason to leave in float.
    """
    calls = analysis.flow.calls_of(name)
    return bool(calls) and name not in plan.float_reasons and all(analysis.keeps_grid(call) for call in calls)


def _reason(name: str, module: nn.Module, analysis: Analysis, plan: Plan) -> str:
    """Return why the module called ``name`` is in float, as text for :attr:`LayerRecord.reason`."""
    calls = analysis.flow.calls_of(name)
    if name in plan.float_reasons:
        return plan.float_reasons[name]
    if not calls and not analysis.flow.frames_of(name):
        return why_uncalled(name, analysis)
    if isinstance(module, ScriptModule):
        return "torch.jit made it: it runs as it is, since its inside can't be seen"
    if isinstance(module, _BatchNorm):
        return "no convolution or linear layer alone precedes it"
    clipped = _clipped_layer(name, analysis, plan)
    if clipped is not None:
        return clip_reason(clipped)
    if original_class(module) in QUANTIZED_FORMS:
        return "nothing quantized reads its result, or it reads nothing quantized"
    return f"{type(module).__name__} has no quantized form"


def clip_reason(layer: str) -> str:
    """Return why a clip stays in the model as it is: ``"the quantizer of stem.0 stands behind it"``.

    The text is for :attr:`LayerRecord.reason`. The clip (a ReLU6, say) directly follows the layer named ``layer``. That
    layer's output quantizer was moved behind the clip, so that values are clipped first and rounded once.
    """
    return f"the quantizer of {layer} stands behind it"


def _clipped_layer(name: str, analysis: Analysis, plan: Plan) -> str | None:
    """Return the layer whose result the clip ``name`` (a ReLU6, say) clips before it is quantized.

    None if there is none.
    """
    for layer in plan.layers:
        followers = (analysis.follower(analysis.flow.calls[index]) for index in layer.ends)
        if layer.name in plan.clipped and any(call is not None and call.module_name == name for call in followers):
            return layer.name
    return None
