"""What became of each layer of a prepared model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.fixed_point import Links
from tritonq.prepare.decide.joins import Join
from tritonq.prepare.decide.layers import Layer
from tritonq.prepare.decide.plan import Plan


@dataclass(frozen=True)
class LayerRecord:
    """What became of one layer.

    Attributes:
        name: qualified name in the float model; for additions and concatenations that of the module made of them.
        kind: class name, or the operation.
        fused_with: names of what it became one layer with.
        status: ``"quantized"`` or ``"float"``.
        reason: why it is in float, or "".
    """

    name: str
    kind: str
    fused_with: tuple[str, ...]
    status: Literal["quantized", "float"]
    reason: str


def layer_records(
    analysis: Analysis, plan: Plan, join_names: Mapping[Join, str], unary_names: Mapping[int, str]
) -> tuple[LayerRecord, ...]:
    """A record for each layer of the float model, in order of its modules, then one for each addition and the like."""
    calls = analysis.flow.calls
    partners: dict[str, list[str]] = {}
    parts: tuple[Layer | Join, ...] = (*plan.layers, *plan.joins)
    for part in parts:
        name = part.name if isinstance(part, Layer) else join_names[part]
        absorbed = [calls[index].module_name for index in part.relus]
        absorbed.append(part.batch_norm if isinstance(part, Layer) else None)
        for other in dict.fromkeys(other for other in absorbed if other is not None):
            partners.setdefault(name, []).append(other)
            partners.setdefault(other, []).append(name)
    quantized = {layer.name for layer in plan.layers}
    quantized |= {place.owner for place in plan.quantizers if place.value in plan.unary and place.where == "output"}
    records = []
    for name, module in analysis.modules.items():
        if name not in analysis.leaves and not isinstance(module, _BatchNorm) and name not in partners:
            continue
        if type(module) in (nn.Identity, nn.Sequential):
            continue
        whole = name in quantized or (name in partners and _absorbed(name, analysis, plan))
        reason = "" if whole else _reason(name, module, analysis, plan)
        fused = tuple(partners.get(name, ()))
        records.append(LayerRecord(name, type(module).__name__, fused, "quantized" if whole else "float", reason))
    for layer in plan.layers:
        if layer.function is not None:
            kind, fused = layer.function.calls[0].name, tuple(partners.get(layer.name, ()))
            records.append(LayerRecord(layer.name, kind, fused, "quantized", ""))
    for join in plan.joins:
        name = join_names[join]
        records.append(LayerRecord(name, join.kind, tuple(partners.get(name, ())), "quantized", ""))
    for value, name in unary_names.items():
        kind = calls[plan.unary[value].calls[0]].name
        records.append(LayerRecord(name, kind, (), "quantized", ""))
    places = {record.name for record in records}
    for name, reason in plan.float_reasons.items():
        if name not in places:
            kind = plan.float_functions.get(name, name.rpartition(".")[2])
            records.append(LayerRecord(name, kind, (), "float", reason))
    return tuple(dict.fromkeys(records))


def fixed_point_records(links: Links) -> tuple[LayerRecord, ...]:
    """A record for each layer, addition and average pooling."""
    records = []
    for layer in links.layers.values():
        kind = layer.row[0].__name__
        fused = () if layer.batch_norm is None else (layer.batch_norm,)
        records.append(LayerRecord(layer.name, kind, fused, "quantized", ""))
    calls = [*links.additions.values(), *(pooling.call for pooling in links.poolings.values())]
    for call in calls:
        name = call.module_name or f"{call.owner}.{call.name}".lstrip(".")
        records.append(LayerRecord(name, call.name, (), "quantized", ""))
    return tuple(records)


def _absorbed(name: str, analysis: Analysis, plan: Plan) -> bool:
    """Whether every call of a BatchNorm or ReLU became part of something else."""
    if any(layer.batch_norm == name for layer in plan.layers):
        return True
    return all(call.index in plan.erased for call in analysis.flow.calls_of(name))


def _reason(name: str, module: nn.Module, analysis: Analysis, plan: Plan) -> str:
    calls = analysis.flow.calls_of(name)
    if name in plan.float_reasons:
        return plan.float_reasons[name]
    if not calls and not analysis.flow.frames_of(name):
        return "the example inputs don't reach it"
    if isinstance(module, _BatchNorm):
        return "no convolution or linear layer alone precedes it"
    if all(analysis.keeps_grid(call) for call in calls):
        return "it keeps the grid of its input"
    clipped = _clipped_layer(name, analysis, plan)
    if clipped is not None:
        return f"the quantizer of {clipped} stands behind it"
    return f"{type(module).__name__} has no quantized form; what reads it quantizes its result"


def _clipped_layer(name: str, analysis: Analysis, plan: Plan) -> str | None:
    """The layer whose result a ReLU6 or the like clips before it is quantized."""
    for layer in plan.layers:
        followers = (analysis.follower(analysis.flow.calls[index]) for index in layer.ends)
        if layer.name in plan.clipped and any(call is not None and call.module_name == name for call in followers):
            return layer.name
    return None
