"""Find layers that a forward calls as functions: ``F.conv2d``, ``F.linear`` and so on with a weight of the model's own.

The weight, and the bias, must follow from parameters and buffers alone. A child module will take the place of the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tritonq.functional.linear_map import per_axis
from tritonq.prepare.decide.analysis import IN_TRANSFORM, Analysis
from tritonq.prepare.decide.constants import PlannedProgram
from tritonq.prepare.forwards.geometry import argument_names, geometry_of
from tritonq.prepare.forwards.proof import Site
from tritonq.prepare.forwards.trace import TraceError
from tritonq.prepare.record.dataflow import Call, Ref

# The float layer that computes what a function does.
FUNCTIONS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
    "linear": nn.Linear,
}
# With further functions that have weights and no quantized form.
FUNCTIONS_WITH_WEIGHTS = frozenset({*FUNCTIONS, "bilinear", "embedding", "embedding_bag"})
_DEFAULTS: dict[str, Any] = {
    "bias": None,
    "stride": 1,
    "padding": 0,
    "output_padding": 0,
    "dilation": 1,
    "groups": 1,
}


@dataclass(frozen=True)
class CalledLayer:
    """A convolution or ``F.linear`` at one place in a forward, which becomes a layer.

    Attributes:
        owner: qualified name of the module in whose forward it is called; "" for the model.
        child: name of the child of ``owner`` that will take its place.
        kind: the float layer that computes the same, such as ``nn.Conv2d``.
        site: where it is called: the place in the forward that will be edited.
        geometry: arguments of that layer's constructor, by name, ``bias`` (a bool) among them.
        given: those arguments of the call that are not input, weight or bias, by name.
        calls: its recorded calls, in all recorded modes.
        program: the recorded calls that compute its weight and its bias (if it has one) from parameters and buffers.
    """

    owner: str
    child: str
    kind: type[nn.Module]
    site: Site
    geometry: Mapping[str, Any]
    given: Mapping[str, Any]
    calls: tuple[Call, ...]
    program: PlannedProgram

    @property
    def name(self) -> str:
        """Qualified name of the child, such as "block.conv"; for a call in the model's own forward just ``child``."""
        return f"{self.owner}.{self.child}".lstrip(".")


def arguments_of(call: Call) -> dict[str, Any]:
    """Return all arguments of a call of a convolution or ``F.linear`` by name, with defaults.

    In the place of a tensor stands a ``Ref``, which holds its index in ``Dataflow.values``; no bias is None.
    """
    names = argument_names(call.name)
    defaults = {name: _DEFAULTS[name] for name in names[2:]}
    return {**defaults, **dict(zip(names, call.args, strict=False)), **call.kwargs}


def find_called_layer(call: Call, child: str, analysis: Analysis) -> CalledLayer | str:
    """Return the layer that a call of a convolution or ``F.linear`` becomes, or the reason why it stays in float.

    A reason is a text for users: "its weight depends on the model's input". To become a layer, all calls at its
    place must be alike (function, stride, padding and so on), run outside of ``torch.vmap`` and the like, read a tensor
    as input, and take the same weight and bias, which follow from parameters and buffers alone. There must be
    calls in each recorded mode, the input of one at least must be no constant, and the forward must be editable.

    Args:
        call: the first of its calls.
        child: name of the child that will take its place.
        analysis: the model and its record.
    """
    calls = analysis.calls_like(call)
    if any(other.name != call.name for other in calls):
        return "its forward does different things in different calls"
    if any(other.transformed for other in calls):
        return IN_TRANSFORM
    given = [arguments_of(other) for other in calls]
    for arguments in given:
        weight, bias = arguments["weight"], arguments["bias"]
        tensors = [item for item in (weight, bias) if item is not None]
        if not all(isinstance(item, Ref) and item.value in analysis.constants.values for item in tensors):
            refs = [item.value for item in tensors if isinstance(item, Ref)]
            return _UNFIT[analysis.constants.rests_on(refs)]
        if not isinstance(arguments["input"], Ref):
            return "it reads no tensor"
    if all(arguments["input"].value in analysis.constants.values for arguments in given):
        return CONSTANT_INPUT
    if not analysis.runs_in_all_modes(calls):
        return analysis.missing_mode(calls)
    site = analysis.site(call)
    if site is None or any(analysis.site(other) != site for other in calls):
        forward = analysis.forward(call.owner)
        why = str(forward) if isinstance(forward, TraceError) else "it differs in training"
        return f"the forward of {call.owner or 'the model'} can't be edited: {why}"
    geometries = [_geometry(call, arguments, analysis) for arguments in given]
    if any(geometry != geometries[0] for geometry in geometries):
        return "its stride, padding or the like differ between calls"
    program = analysis.constants.program(_weights(given[0]))
    if program is None or not program.state:
        return "its weight is computed by code that can't be repeated"
    first = [arguments for arguments, other in zip(given, calls, strict=True) if other.run == calls[0].run]
    names = {analysis.constants.state_names(_weights(arguments)) for arguments in first}
    if len(names) > 1:
        return "its weight is another one in each call"
    kind, named = FUNCTIONS[call.name], geometry_of(call.name, call.args, call.kwargs)
    return CalledLayer(call.owner, child, kind, site, geometries[0], named, calls, program)


# Why a weight that does not follow from parameters alone can't be quantized, by what it follows from.
_UNFIT = {
    "unknown": "its weight is none of the model's",
    "input": "its weight depends on the model's input",
    "random": "its weight is drawn at random",
}
# Why what reads constants only is left alone: its result is a constant too.
CONSTANT_INPUT = "it reads nothing but parameters, so that its result is a constant"


def _weights(arguments: Mapping[str, Any]) -> list[int]:
    """Return the value indices of weight and bias (if any) among ``arguments``, from :func:`arguments_of`."""
    return [arguments[name].value for name in ("weight", "bias") if arguments[name] is not None]


def exclusive_state(layers: Iterable[CalledLayer], analysis: Analysis) -> frozenset[str]:
    """Return qualified names of the parameters and buffers that only the weights and biases of ``layers`` need.

    Conversion drops them, since the converted layers hold their weights. Empty if there are no layers.
    """
    calls = [call for layer in layers for call in layer.calls]
    ends = [(value, call.index) for call in calls for value in _weights(arguments_of(call))]
    return analysis.constants.exclusive(ends) if ends else frozenset()


def _geometry(call: Call, arguments: Mapping[str, Any], analysis: Analysis) -> dict[str, Any]:
    """Return the arguments, by name, for the constructor of the layer that computes the same as a call.

    They are ``in_channels``, ``kernel_size`` and so on (``in_features``, ``out_features`` for linear) and ``bias``, a
    bool. ``arguments`` are those of the call, as :func:`arguments_of` returned them.
    """
    shape = analysis.flow.values[arguments["weight"].value].shape
    has_bias = arguments["bias"] is not None
    if call.name == "linear":
        return {"in_features": shape[1], "out_features": shape[0], "bias": has_bias}
    rank, groups = len(shape) - 2, arguments["groups"]
    numbers = {
        name: value if isinstance(value, str) else per_axis(value, rank)
        for name, value in arguments.items()
        if name in ("stride", "padding", "dilation", "output_padding")
    }
    transposed = "transpose" in call.name
    return {
        "in_channels": shape[0] if transposed else shape[1] * groups,
        "out_channels": shape[1] * groups if transposed else shape[0],
        "kernel_size": tuple(shape[2:]),
        "groups": groups,
        "bias": has_bias,
        **numbers,
    }
