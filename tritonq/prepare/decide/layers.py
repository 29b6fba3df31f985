"""Find the modules that become one quantized layer, such as convolution, BatchNorm and ReLU, from the record.

A *frozen norm* is a module that normalises each channel with fixed numbers.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.called_layers import CalledLayer
from tritonq.prepare.decide.clips import ceiling_of_call
from tritonq.prepare.decide.frozen_norms import FrozenNorm, find_frozen_norm
from tritonq.prepare.decide.rows import ROWS, Types, batch_norm_obstacle, out_channels
from tritonq.prepare.record.dataflow import Call, CallIndex, refs_in
from tritonq.prepare.record.float_types import float_type


@dataclass(frozen=True)
class Layer:
    """A module, or a function with weights, that becomes a quantized layer, with what it absorbs.

    Attributes:
        name: qualified name of the module; for a function that of the child which will take its place.
        row: float types of its parts, such as ``(nn.Conv2d, nn.BatchNorm2d, nn.ReLU)``: the key into ``rows.ROWS`` if
            there is more than one. A part may be of a subclass.
        batch_norm: name of the BatchNorm or frozen norm that becomes part of it; None without one.
        remainder: names of the modules inside of that BatchNorm that stay, such as the activation of a BatchNorm with
            one; empty without such modules.
        calls: indices of its calls.
        ends: for each call the index of the last call that becomes part of it, or of the call itself.
        relus: indices of the ReLU calls that become part of it.
        ceiling: upper bound of these ReLUs, infinity for plain ones; None if there are none.
        function: the place of the function in a forward, and its calls, if the layer is one; None for a module.
        frozen: the operations of its BatchNorm, if that is no BatchNorm of torch but a frozen norm; else None.
    """

    name: str
    row: Types
    batch_norm: str | None
    remainder: tuple[str, ...]
    calls: tuple[CallIndex, ...]
    ends: tuple[CallIndex, ...]
    relus: tuple[CallIndex, ...]
    ceiling: float | None
    function: CalledLayer | None = None
    frozen: FrozenNorm | None = None

    @property
    def home(self) -> str:
        """Name of the float module whose qconfig and device the layer has.

        That is the layer's own module, or for a function the module whose forward calls it, "" for the model.
        """
        return self.name if self.function is None else self.function.owner


@dataclass(frozen=True)
class _Norm:
    """The calls of a BatchNorm in the record.

    Attributes:
        name: qualified name of the module.
        kind: the BatchNorm class of torch that it computes as.
        calls: its calls that read what is normalised, in order.
        remainder: names of its children that stay when it becomes part of a layer, such as an activation.
        frozen: its operations, if it is a frozen norm; else None.
    """

    name: str
    kind: type[nn.Module]
    calls: tuple[Call, ...]
    remainder: tuple[str, ...]
    frozen: FrozenNorm | None = None

    @property
    def ends(self) -> tuple[Call, ...]:
        return self.calls if self.frozen is None else self.frozen.ends


def find_layer(
    name: str,
    kind: type[nn.Module],
    analysis: Analysis,
    swapped: Container[type[nn.Module]],
    kept: Container[CallIndex] = (),
    function: CalledLayer | None = None,
) -> tuple[Layer, str | None]:
    """Return the layer that begins with a module or function, and why the BatchNorm behind it is not part of it.

    The reason is a text such as ``"hooks stand between the two"``; None if there is no such BatchNorm, if it is part of
    the layer, or if it is left apart only because no type in ``swapped`` has both. A frozen norm counts as a BatchNorm.

    Args:
        name: name of the module, or of the child that a function will become.
        kind: the float type that it computes as.
        analysis: the model and its record.
        swapped: the float types that have a quantized form; a row is used only if its fused type is one of them.
        kept: indices of ReLU calls that must not become part of the layer.
        function: the function, if the layer is one; None for a module.
    """
    module = analysis.modules[name if function is None else function.owner]
    channels = out_channels(module) if function is None else _channels(function)
    row: Types = (kind,)
    calls = analysis.flow.calls_of(name) if function is None else function.calls
    ends = calls
    norm, obstacle = _norm_after(_Start(name, kind, module, channels, calls), analysis)
    if norm is not None and ROWS.get((*row, norm.kind)) in swapped:
        row, ends = (*row, norm.kind), norm.ends
    else:
        norm = None
    absorbed, ceiling = relus_after(ends, analysis, kept)
    has_relu = (
        ceiling is not None
        and ROWS.get((*row, nn.ReLU)) in swapped
        and not has_hooks(module if norm is None else analysis.modules[norm.name], after=True)
    )
    if has_relu:
        row, ends = (*row, nn.ReLU), tuple(absorbed)
    layer = Layer(
        name=name,
        row=row,
        batch_norm=None if norm is None else norm.name,
        remainder=() if norm is None else norm.remainder,
        calls=tuple(call.index for call in calls),
        ends=tuple(call.index for call in ends),
        relus=tuple(relu.index for relu in absorbed) if has_relu else (),
        ceiling=ceiling if has_relu else None,
        function=function,
        frozen=None if norm is None else norm.frozen,
    )
    return layer, obstacle


def find_layer_in_eval(
    name: str, kind: type[nn.Module], all_runs: Analysis, swapped: Container[type[nn.Module]], eval_calls: int
) -> tuple[Layer, str | None]:
    """Return what :func:`find_layer` returns of a module for all runs, but with the layer's calls in eval mode alone.

    The record of ``all_runs`` begins with the ``eval_calls`` calls of the run in eval mode. ``name``, ``kind`` and
    ``swapped`` are those of :func:`find_layer`.
    """
    layer, obstacle = find_layer(name, kind, all_runs, swapped)
    calls, ends, relus = (tuple(i for i in part if i < eval_calls) for part in (layer.calls, layer.ends, layer.relus))
    return replace(layer, calls=calls, ends=ends, relus=relus), obstacle


def _channels(function: CalledLayer) -> int:
    """Return the number of out channels of a function."""
    name = "out_features" if function.kind is nn.Linear else "out_channels"
    return int(function.geometry[name])


@dataclass(frozen=True)
class _Start:
    """The convolution or linear layer that a layer begins with.

    Attributes:
        name: name of the module, or of the child that a function becomes.
        kind: float type that it computes as.
        module: the module, or the owner of the function.
        channels: number of out channels; None if the type has none.
        calls: all calls of the module or function, in order.
    """

    name: str
    kind: type[nn.Module]
    module: nn.Module
    channels: int | None
    calls: tuple[Call, ...]


def relus_after(
    calls: Sequence[Call], analysis: Analysis, kept: Container[CallIndex]
) -> tuple[list[Call], float | None]:
    """Return the calls of the ReLUs that can become part of a layer or join, and their ceiling.

    Args:
        calls: the last calls of the layer or join. A ReLU must be the only reader of each result, directly or behind
            ``nn.Identity``, and the model must not return the result.
        analysis: the model and its record.
        kept: indices of ReLU calls that must not become part of a layer.

    Returns:
        ``(calls, upper bound)``, infinity for plain ReLUs. ``([], None)`` if ``calls`` is empty, a call has no such
        ReLU or one of ``kept``, the bounds differ, a ReLU has hooks, or a forward that makes one of these calls depends
        on the mode and was not recorded in training mode.
    """
    found = [analysis.follower(call) for call in calls]
    relus = [relu for relu in found if relu is not None and relu.index not in kept]
    ceilings = {ceiling_of_call(relu) for relu in relus}
    if not relus or len(relus) < len(found) or len(ceilings) > 1 or None in ceilings:
        return [], None
    if any(has_hooks(relu.target) for relu in relus):
        return [], None
    if not all(map(analysis.may_fuse_in, {call.owner for call in (*calls, *relus)})):
        return [], None
    return relus, ceilings.pop()


def _norm_after(start: _Start, analysis: Analysis) -> tuple[_Norm | None, str | None]:
    """Return the BatchNorm behind a layer's calls, and the reason why it can't become part of the layer.

    It must be the only reader of each call's result, and must read nothing else. The results are ``(norm, None)``;
    ``(None, reason)`` if it can't; ``(None, None)`` if no BatchNorm follows.
    """
    name, calls = start.name, start.calls
    followers = [analysis.follower(call) for call in calls]
    norms = [None if follower is None else _norm_of(follower, analysis) for follower in followers]
    if not norms or norms[0] is None:
        return None, None
    norm = norms[0]
    if any(other is None or other.name != norm.name for other in norms):
        return None, f"{name} is not followed by the same BatchNorm in each call"
    if {call.index for call in norm.calls} != {follower.index for follower in followers if follower is not None}:
        return None, f"{norm.name} normalises more than the output of {name}"
    if not all(map(analysis.may_fuse_in, {call.owner for call in (*calls, *norm.calls)} - {norm.name})):
        return None, "the forward depends on the mode and could not be recorded in training"
    bn = analysis.modules[norm.name]
    if norm.frozen is None:
        obstacle = batch_norm_obstacle(start.channels, cast(_BatchNorm, bn))
    else:
        obstacle = None if norm.frozen.channels == start.channels else f"{norm.name} normalises another axis"
    if obstacle is None and issubclass(start.kind, nn.Linear):
        ranks = {len(analysis.flow.values[call.inputs[0]].shape) for call in norm.calls}
        obstacle = None if ranks == {2} else "BatchNorm1d of a linear layer normalises another axis than the features"
    if obstacle is None and (has_hooks(start.module, after=True) or has_hooks(bn, before=True)):
        obstacle = "hooks stand between the two"
    return (norm, None) if obstacle is None else (None, obstacle)


def _norm_of(call: Call, analysis: Analysis) -> _Norm | None:
    """Return the BatchNorm that a call runs; None if it runs none.

    That is a module, ``F.batch_norm`` inside of a BatchNorm subclass, or the first operation of a frozen norm.
    """
    if call.kind == "module":
        kind = _norm_type(call, analysis)
        if call.module_name is None or kind is None:
            return None
        return _Norm(call.module_name, kind, analysis.flow.calls_of(call.module_name), ())
    owner = analysis.modules[call.owner]
    kinds = [kind for kind in _NORMS if isinstance(owner, kind)]
    if not kinds:
        frozen = find_frozen_norm(call.owner, analysis)
        kind = None if frozen is None else _NORM_OF_DIMENSIONS.get(frozen.dimensions)
        return (
            None if frozen is None or kind is None else _Norm(call.owner, kind, frozen.starts, frozen.remainder, frozen)
        )
    if call.name != "batch_norm":
        return None
    return _norm_with_activation(call.owner, kinds[0], analysis)


def _norm_type(call: Call, analysis: Analysis) -> type[nn.Module] | None:
    """Return the BatchNorm class of torch that the called module computes as; None for other modules.

    For a SyncBatchNorm the dimensions of its input decide.
    """
    module = cast(nn.Module, call.target)
    if float_type(module, (nn.SyncBatchNorm,)) is not None:
        dimensions = len(analysis.flow.values[call.inputs[0]].shape)
        return _NORM_OF_DIMENSIONS.get(dimensions)
    return float_type(module, _NORMS)


def _norm_with_activation(owner: str, kind: type[nn.Module], analysis: Analysis) -> _Norm | None:
    """Return a BatchNorm subclass that normalises with its own parameters and then calls children one after the other.

    None if its forward does anything else. ``kind`` is the BatchNorm class of torch that it derives from.
    """
    flow, module = analysis.flow, analysis.modules[owner]
    hearts: list[Call] = []
    chains: set[tuple[str, ...]] = set()
    for frame in flow.frames_of(owner):
        if any(kind != "call" for kind, _ in frame.events) or not frame.events:
            return None
        heart, *rest = (flow.calls[index] for _, index in frame.events)
        state = [str(flow.values[value].path[0]) for value in heart.inputs if flow.is_state(value)]
        taken = (module.weight, module.bias, module.running_mean, module.running_var)
        own = {id(tensor) for tensor in taken if tensor is not None}
        reads_own = len(state) == len(own) and all(id(attrgetter(name)(analysis.model)) in own for name in state)
        if heart.name != "batch_norm" or not reads_own or heart.inputs[0] not in refs_in(frame.args):
            return None
        last = heart
        for call in rest:
            if call.module_name is None or call.inputs != (analysis.value_of(last),):
                return None
            last = call
        if analysis.value_of(frame) != analysis.value_of(last):
            return None
        hearts.append(heart)
        chains.add(tuple(str(call.module_name) for call in rest))
    return _Norm(owner, kind, tuple(hearts), chains.pop()) if len(chains) == 1 else None


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORM_OF_DIMENSIONS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def has_hooks(module: object, before: bool = False, after: bool = False) -> bool:
    """Whether a module has hooks that see values before its forward, after it, or (neither given) on any side.

    ``before`` asks for hooks before the forward, ``after`` for hooks after it; with both, hooks on one side suffice.
    Backward hooks always count. False for an object that is no module.
    """
    if not isinstance(module, nn.Module):
        return False
    either = not before and not after
    if module._backward_hooks or module._backward_pre_hooks:  # they see gradients on either side
        return True
    return bool(((before or either) and module._forward_pre_hooks) or ((after or either) and module._forward_hooks))
