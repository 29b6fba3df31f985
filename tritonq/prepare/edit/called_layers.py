"""Layers that were functions: their float form, and how their weights follow from the model's parameters."""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

from torch import Tensor, nn

from tritonq.nn.computed import ComputedParameters, Slot, StateSlot, Step
from tritonq.nn.reference import Reference
from tritonq.prepare.decide.called_layers import CalledLayer
from tritonq.prepare.decide.constants import PlannedProgram
from tritonq.prepare.record.dataflow import Call, Ref


def float_layer(function: CalledLayer, model: nn.Module, training: bool) -> nn.Module:
    """Return a float layer that computes what a function does, on its device.

    The values of its parameters are undefined.
    """
    tensor = _state(model, next(iter(function.program.state.values())))
    made = function.kind(**function.geometry, device="meta", dtype=tensor.dtype).to_empty(device=tensor.device)
    made.training = training
    return made


def computed_parameters(
    program: PlannedProgram, model: nn.Module, exclusive: Container[str] = ()
) -> ComputedParameters:
    """Return how weight and bias follow from the state of ``model``, whose modules are in their final places.

    ``exclusive`` holds the names of parameters and buffers that nothing else reads.
    """
    state = []
    for value, name in program.state.items():
        owner, _, own_name = name.rpartition(".")
        state.append(StateSlot(value, Reference(model.get_submodule(owner)), own_name, name in exclusive))
    steps = [_step(call, model) for call in program.calls]
    weight, *bias = map(Slot, program.results)
    return ComputedParameters(state, steps, weight, bias[0] if bias else None)


def _step(call: Call, model: nn.Module) -> Step:
    target: Any = call.target
    if getattr(target, "__name__", "") == "__get__":  # an attribute, such as weight.T, in a form that can be copied
        target = operator.attrgetter(call.name)
    if call.module_name is not None:
        target = Reference(model.get_submodule(call.module_name))
    return Step(target, _slots(call.args), _slots(call.kwargs), _slots(call.output), call.writes)


def _slots(item: Any) -> Any:
    if isinstance(item, Ref):
        return Slot(item.value)
    if isinstance(item, tuple):
        return tuple(map(_slots, item))
    return {key: _slots(child) for key, child in item.items()} if isinstance(item, dict) else item


def _state(model: nn.Module, name: str) -> Tensor:
    owner, _, own_name = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), own_name)
    return tensor
