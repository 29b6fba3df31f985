"""Make layers in the place of functions: the float layer, and the program that computes its weight."""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

from torch import nn

from tritonq.nn.computed import ComputedParameters, Slot, StateSlot, Step
from tritonq.nn.reference import Reference
from tritonq.prepare.decide.called_layers import CalledLayer
from tritonq.prepare.decide.constants import PlannedProgram
from tritonq.prepare.record.dataflow import Call, replace_refs


def float_layer(function: CalledLayer, model: nn.Module, training: bool) -> nn.Module:
    """Return a float layer that computes what a function does, such as an ``nn.Conv2d`` for ``F.conv2d``.

    Its parameters have the device and dtype of the first tensor that the weight is computed from. Their values are
    undefined: the caller has the layer compute them by :func:`computed_parameters`.

    Args:
        function: the recorded call of the function.
        model: the model, whose parameters the weight is computed from.
        training: whether the layer is in training mode.
    """
    tensor = operator.attrgetter(next(iter(function.program.state.values())))(model)
    made = function.kind(**function.geometry, device="meta", dtype=tensor.dtype).to_empty(device=tensor.device)
    made.training = training
    return made


def computed_parameters(
    program: PlannedProgram, model: nn.Module, exclusive: Container[str] = ()
) -> ComputedParameters:
    """Return an object that computes weight and bias of a layer from the parameters and buffers of ``model``.

    It reads them anew each time that it is called.

    Args:
        program: the recorded calls that compute them; its results are the weight and, if there is one, the bias.
        model: the model, with its modules in their final places.
        exclusive: qualified names of parameters and buffers that only such computations read; conversion drops them.
    """
    state = []
    for value, name in program.state.items():
        owner, _, own_name = name.rpartition(".")
        state.append(StateSlot(value, Reference(model.get_submodule(owner)), own_name, name in exclusive))
    steps = [_step(call, model) for call in program.calls]
    weight, *bias = map(Slot, program.results)
    return ComputedParameters(state, steps, weight, bias[0] if bias else None)


def _step(call: Call, model: nn.Module) -> Step:
    """Return a recorded call as a step that can be repeated with other values; modules become references."""
    target: Any = call.target
    if getattr(target, "__name__", "") == "__get__":  # an attribute, such as weight.T, in a form that can be copied
        target = operator.attrgetter(call.name)
    if call.module_name is not None:
        target = Reference(model.get_submodule(call.module_name))
    return Step(target, _slots(call.args), _slots(call.kwargs), _slots(call.output), call.writes)


def _slots(item: Any) -> Any:
    """Return recorded arguments for a program, with a ``Slot`` of the same number for each recorded tensor."""
    return replace_refs(item, lambda ref: Slot(ref.value))
