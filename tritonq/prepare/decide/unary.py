"""Find operations of one tensor that become modules computing on codes: those behind which a quantizer stands.

A code is the integer that stands for a quantized value. To add a kind, add what recognises its calls to ``_READERS``,
its module to :func:`layer_for` and, if torch.nn has a module of that kind, its quantized form to ``QUANTIZED_FORMS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import nn

from tritonq.nn import Average
from tritonq.nn.average_pool import POOL_TYPES
from tritonq.nn.clip import CLIP_MODULES, Clip, Clipping
from tritonq.nn.functions import FUNCTION_MODULES, FunctionLayer, PReLU
from tritonq.nn.unary import UnaryLayer
from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.average_pool import averaging_of_call, may_change
from tritonq.prepare.decide.chains import Chains, is_checked, joined_clips, joined_function
from tritonq.prepare.decide.clips import bounds_of_call, clipping_of_call
from tritonq.prepare.decide.functions import function_of_call, prelu_of_call
from tritonq.prepare.forwards.graph import ForwardGraph
from tritonq.prepare.record.dataflow import Call, CallIndex, Ref, ValueIndex
from tritonq.reference.average_pool import Averaging
from tritonq.reference.functions import Function

# What a call computes, without quantizers: hashable, equal where two calls compute the same.
# A PReLU, whose slope is a parameter of its module, is told by its class.
Operation: TypeAlias = Averaging | Function | Clipping | type[nn.PReLU]
# The operation of a call, given the shape of what it reads and whether its other arguments are constants.
Reader: TypeAlias = Callable[[Call, tuple[int, ...], bool], Operation | None]

_READERS: tuple[Reader, ...] = (averaging_of_call, function_of_call, prelu_of_call, clipping_of_call)

# What takes the place of a module, by its exact type; made by ``from_float``.
QUANTIZED_FORMS: Mapping[type[nn.Module], Any] = {
    **POOL_TYPES,
    **dict.fromkeys(FUNCTION_MODULES, FunctionLayer),
    nn.PReLU: PReLU,
    **dict.fromkeys(CLIP_MODULES, Clip),
}


def layer_for(operation: Operation, earlier: Clipping | None) -> UnaryLayer:
    """Return the module for an operation in a forward; it has no quantizer of its own yet.

    Args:
        operation: the operation; a PReLU is refused, since it is a module already.
        earlier: for a clip, the bounds of the clips before it that it replaces; None: there are none.

    Raises:
        TypeError: the operation is a PReLU.
    """
    if isinstance(operation, Function):
        return FunctionLayer(operation)
    if isinstance(operation, Clipping):
        return Clip(operation, earlier=earlier)
    if isinstance(operation, type):
        raise TypeError("a PReLU is a module already")
    return Average(operation)


@dataclass(frozen=True)
class PlannedUnary:
    """An operation of one tensor with a quantizer behind it, which a module of tritonq will compute.

    Attributes:
        operation: what it computes, as plain data: an ``Averaging``, a ``Function`` or a ``Clipping``, or the class
            ``nn.PReLU``.
        source: the layer, join or planned quantizer that gives its input a grid; None if there is none or calls have
            different ones (only functions and clips are planned then).
        calls: indices of its calls, one for each time that it runs.
        earlier: for a clip, the bounds that all clips directly before it amount to together, which its module computes
            too; None: no clip stands before it, or the operation is no clip.
        absorbed: indices of the calls of those earlier clips; empty without any.
    """

    operation: Operation
    source: object
    calls: tuple[CallIndex, ...]
    earlier: Clipping | None = None
    absorbed: tuple[CallIndex, ...] = ()


class QuantizerPlace(Protocol):
    """Where a quantizer stands: the attributes of `tritonq.prepare.decide.plan.PlannedQuantizer` that this file reads.

    ``where`` is the kind of place: "output" (behind a module), "node" (behind a call in a forward), "consumer" (in each
    layer that reads the tensor). ``owner`` is the name of a module, and ``node`` that of a node in the graph of this
    module's forward, or of a place in a forward without a graph.
    """

    @property
    def where(self) -> str:
        """Its kind: "output" (behind a module), "node" (behind a call in a forward), "consumer" (in readers)."""

    @property
    def owner(self) -> str:
        """Qualified name of the module behind which, or in whose forward, it stands.

        "" for the model itself and for ``"consumer"``.
        """

    @property
    def node(self) -> str:
        """Name of the graph's node behind which it stands, if :attr:`where` is "node"; else "".

        In a forward without a graph it is ``Call.place`` of the call.
        """


def find_unary(
    place: QuantizerPlace, analysis: Analysis, chains: Chains, grid_of: Callable[[ValueIndex], object]
) -> PlannedUnary | None:
    """Return the operation of one tensor behind which a quantizer stands, so that a module can compute it on codes.

    None if there is no such operation, or if one of these holds:

    - calls at the place compute different operations, or are clips with different clips before them;
    - the operation is a mean or PReLU, and its input lies on no grid, or not on the same one in all calls;
    - number arguments of the operation (such as a slope) may differ from call to call, and the forward has no place at
      which they could be compared with the recorded ones when it runs.

    Args:
        place: where the quantizer stands.
        analysis: the model and its record.
        chains: finds the calls that become one operation with another.
        grid_of: returns the layer, join or planned quantizer that gives a value, by index, its grid; None without one.
    """
    found = _calls_at(place, analysis)
    if found is None:
        return None
    calls, fixed = found
    rows = [chains.row(call) for call in calls]
    operation, *others = {_operation_of_row(row, analysis, fixed) for row in rows}
    if operation is None or others:
        return None
    bounds = {joined_clips(row[:-1]) for row in rows} if isinstance(operation, Clipping) else {None}
    if len(bounds) > 1:
        return None
    source = grid_of(rows[0][0].inputs[0])
    if any(grid_of(first.inputs[0]) is not source for first, *_ in rows):
        source = None
    # Without a grid a function is computed in float, but still keeps less for the backward than with a quantizer apart;
    # a clip behind a layer works on the grid of its own quantizer.
    if source is None and not isinstance(operation, (Function, Clipping)):
        return None
    if not fixed and _may_change(operation, calls):
        is_first = all(call.args and isinstance(call.args[0], Ref) for call in calls)
        if isinstance(analysis.forward(place.owner), ForwardGraph) or not is_first:
            return None  # a graph has no way to ask
    absorbed = tuple(clip.index for row in rows for clip in row[:-1])
    return PlannedUnary(operation, source, tuple(call.index for call in calls), bounds.pop(), absorbed)


def is_unary(call: Call, analysis: Analysis, chains: Chains) -> bool:
    """Whether a call is an operation of one tensor that is worth computing on codes: a mean, function, clip or PReLU.

    A reciprocal is not: the step between two small codes becomes most of its range. ``analysis`` is the model and its
    record; ``chains`` finds the calls before that become one operation with this one.
    """
    operation = _operation_of_row(chains.row(call), analysis, False) if call.inputs else None
    is_reciprocal = isinstance(operation, Function) and any(step.name == "ratio" for step in operation.steps)
    return operation is not None and not is_reciprocal


def source_of(call: Call, analysis: Analysis, chains: Chains, through_norms: bool) -> ValueIndex | None:
    """Return the index of the value that a call computes its result from, so that a grid can be looked for there.

    That is the first input of a call for which :func:`is_unary` holds or which keeps its input's grid, or the value
    that the call scales or shifts by constants or a mask. With ``through_norms`` it is the input of a softmax or norm,
    too. None for any other call. ``chains`` only serves :func:`is_unary`: also where calls before this one become one
    operation with it, the result is what ``call`` itself reads, not what the first of them reads.
    """
    return call.inputs[0] if is_unary(call, analysis, chains) else analysis.source_of(call, through_norms)


def operands_of_unary(place: QuantizerPlace, analysis: Analysis, chains: Chains) -> tuple[ValueIndex, ...]:
    """Return the indices of the values that the operation of one tensor in front of a quantizer reads, each once.

    Empty without such an operation. ``chains`` finds the calls that become one operation with the call behind them.
    """
    calls, fixed = _calls_at(place, analysis) or ((), False)
    rows = [chains.row(call) for call in calls]
    if not all(_operation_of_row(row, analysis, fixed) is not None for row in rows):
        return ()
    return tuple(dict.fromkeys(first.inputs[0] for first, *_ in rows))


def _calls_at(place: QuantizerPlace, analysis: Analysis) -> tuple[tuple[Call, ...], bool] | None:
    """Return ``(calls, fixed)``: the calls whose result a quantizer rounds, and whether their numbers are constants.

    None if the quantizer stands in the readers of a tensor, or behind a module that has no form in tritonq.
    """
    if place.where == "output" and type(analysis.modules[place.owner]) in QUANTIZED_FORMS:
        calls, fixed = analysis.flow.calls_of(place.owner), True
    elif place.where == "node":
        calls, graph = analysis.calls_at(place.owner, place.node), analysis.forward(place.owner)
        fixed = isinstance(graph, ForwardGraph) and graph.has_constant_arguments(place.node)
    else:
        return None
    return (calls, fixed) if calls and all(call.inputs for call in calls) else None


def _may_change(operation: Operation, calls: Sequence[Call]) -> bool:
    """Whether the numbers of an operation may differ between calls, in a forward that keeps its branches."""
    if isinstance(operation, (Function, Clipping)):
        return any(map(is_checked, calls))
    return not isinstance(operation, type) and may_change(operation)


def _operation_of_row(row: Sequence[Call], analysis: Analysis, has_fixed_arguments: bool) -> Operation | None:
    """Return the one operation that a row of calls amounts to; None if it is none, or reads no float tensor.

    For a row of clips it is the last clip.

    ``has_fixed_arguments`` says whether the calls' other arguments are constants.
    """
    source = analysis.flow.values[row[0].inputs[0]]
    if not source.dtype.is_floating_point:
        return None
    joined = joined_function(row)
    if joined is not None:
        return joined
    if len(row) > 1:
        return bounds_of_call(row[-1])
    return _operation_of(row[-1], source.shape, has_fixed_arguments)


def _operation_of(call: Call, shape: tuple[int, ...], has_fixed_arguments: bool) -> Operation | None:
    """Return the operation of one tensor that a call computes; None if it computes something else.

    ``shape`` is that of its input; ``has_fixed_arguments`` says whether its other arguments are constants.
    """
    found = (reader(call, shape, has_fixed_arguments) for reader in _READERS)
    return next((operation for operation in found if operation is not None), None)
