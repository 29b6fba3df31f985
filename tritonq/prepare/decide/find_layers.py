"""Find all layers of a recorded model that get a quantized form, and say why others do not."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from torch import nn

from tritonq.nn.recurrent_forward import has_computed_weights
from tritonq.prepare.decide.adapters import find_adapters
from tritonq.prepare.decide.analysis import IN_TRANSFORM, Analysis
from tritonq.prepare.decide.called_layers import (
    CONSTANT_INPUT,
    FUNCTIONS,
    FUNCTIONS_WITH_WEIGHTS,
    CalledLayer,
    find_called_layer,
)
from tritonq.prepare.decide.layers import Layer, find_layer
from tritonq.prepare.record.dataflow import Call, CallIndex
from tritonq.prepare.record.float_types import float_type
from tritonq.qconfig import QConfig

NO_QCONFIG = "its qconfig is None"
COMPUTED_WEIGHTS = "something computes its weights (weight_norm, a parametrization); a recurrent layer needs its own"


@dataclass
class LayerSearch:
    """Find the layers of a model: modules, and functions with weights.

    :meth:`layers` returns them and fills the attributes.

    Args:
        analysis: the model and its record.
        swapped: the module classes, such as ``nn.Conv2d``, that have a quantized form.
        qconfigs: the qconfig of each module; None leaves it in float.
        kept: indices of the calls of ReLUs that no layer may absorb.

    Attributes:
        reasons: by qualified name, why a layer stays in float, or why a BatchNorm is not part of a layer, such as "its
            qconfig is None"; a function's name is that in ``float_functions``.
        single_mode: names of modules left in float because they run in eval mode only, or in training mode only;
            functions are not among them.
        float_functions: the first call of each function left in float, by the qualified name that its layer would
            have, such as ``block.conv2d``.
    """

    analysis: Analysis
    swapped: Container[type[nn.Module]]
    qconfigs: Mapping[nn.Module, QConfig | None]
    kept: frozenset[CallIndex]
    reasons: dict[str, str] = field(default_factory=dict)
    single_mode: set[str] = field(default_factory=set)
    float_functions: dict[str, Call] = field(default_factory=dict)

    def layers(self) -> list[Layer]:
        """Return all layers that get a quantized form, modules first, then functions; fill all attributes.

        Layers of adapters of low rank (LoRA) are not among them: they stay in float.
        """
        found = [*self._modules(), *self._functions()]
        adapters = find_adapters(found, self.analysis)
        self.reasons |= adapters
        return [layer for layer in found if layer.name not in adapters]

    def _modules(self) -> list[Layer]:
        """Return the layers that are modules; note in ``reasons`` why others of a swapped class stay in float.

        They must run in each recorded mode, have plain weights and a qconfig, and read something else than constants.
        """
        found = []
        for name, module in self.analysis.modules.items():
            kind, calls = float_type(module, self.swapped), self.analysis.flow.calls_of(name)
            if kind is not None and has_computed_weights(module):
                self.reasons[name] = COMPUTED_WEIGHTS
                continue
            if kind is None or (self.analysis.flow.frames_of(name) and not calls):
                continue
            if self.qconfigs[module] is None:
                self.reasons[name] = NO_QCONFIG
            elif not calls:
                self.reasons[name] = why_uncalled(name, self.analysis)
            elif not self.analysis.runs_in_all_modes(calls):
                self.reasons[name] = self.analysis.missing_mode(calls)
                self.single_mode.add(name)
            elif any(call.transformed for call in calls):
                self.reasons[name] = IN_TRANSFORM
            elif all(call.inputs and self.analysis.constants.values.issuperset(call.inputs) for call in calls):
                self.reasons[name] = CONSTANT_INPUT
            else:
                layer, obstacle = find_layer(name, kind, self.analysis, self.swapped, self.kept)
                found.append(layer)
                self._note(layer, obstacle)
        return found

    def _functions(self) -> list[Layer]:
        """Return the layers that are functions with weights, such as ``F.conv2d``; note why others stay in float.

        Calls at one place in a forward are one layer.
        """
        found: list[Layer] = []
        seen: set[int] = set()
        taken: set[str] = set()
        for call in self.analysis.flow.calls:
            if call.kind != "function" or call.name not in FUNCTIONS_WITH_WEIGHTS or call.index in seen:
                continue
            child = self._free_child(call, taken)
            name = f"{call.owner}.{child}".lstrip(".")
            taken.add(name)
            seen.update(other.index for other in self.analysis.calls_like(call))
            function = self._function(call, child)
            if isinstance(function, str):
                self.reasons[name], self.float_functions[name] = function, call
                continue
            layer, obstacle = find_layer(name, function.kind, self.analysis, self.swapped, self.kept, function)
            found.append(layer)
            self._note(layer, obstacle)
        return found

    def _function(self, call: Call, child: str) -> CalledLayer | str:
        """Return the layer that the call of a function becomes, or the reason why it stays in float."""
        if self.qconfigs[self.analysis.modules[call.owner]] is None:
            return NO_QCONFIG
        if FUNCTIONS.get(call.name) not in self.swapped:
            return f"{call.name} has no quantized form"
        return find_called_layer(call, child, self.analysis)

    def _free_child(self, call: Call, taken: Container[str]) -> str:
        """Return the first name among ``conv2d``, ``conv2d_1`` and so on that nothing in the calling module has.

        ``taken`` holds qualified names that are given to other layers already.
        """
        module, prefix = self.analysis.modules[call.owner], f"{call.owner}." if call.owner else ""
        names = (f"{call.name}_{count}" if count else call.name for count in itertools.count())
        return next(name for name in names if not hasattr(module, name) and prefix + name not in taken)

    def _note(self, layer: Layer, obstacle: str | None) -> None:
        """Note ``obstacle`` as the reason why the BatchNorm behind a layer is not part of it; None: nothing to note."""
        followers = [self.analysis.follower(self.analysis.flow.calls[index]) for index in layer.calls]
        if obstacle is not None:
            self.reasons |= {found.module_name or found.owner: obstacle for found in followers if found is not None}


def why_uncalled(name: str, analysis: Analysis) -> str:
    """Return the reason, for the user, why no call of the module ``name`` was recorded.

    Either it is inside of a module whose call was recorded as one, or another call reads its parameters, or nothing ran
    it.
    """
    parts = name.split(".")
    outer = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    whole = next((module for module in outer if analysis.flow.calls_of(module)), None)
    if whole is not None:
        return f"it is part of {whole}, a {type(analysis.modules[whole]).__name__} without a quantized form"
    state = [value for value in analysis.flow.values if value.source == "state" and value.consumers]
    own = (value for value in state if str(value.path[0]).rpartition(".")[0] == name)
    reader = next((analysis.flow.calls[value.consumers[0]] for value in own), None)
    if reader is None:
        return "the example inputs don't reach it"
    return f"nothing calls it: {reader.name} in the forward of {reader.owner or 'the model'} reads its parameters"
