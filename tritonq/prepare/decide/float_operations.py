"""Find operations that stay in float although quantized tensors lie before and behind them."""

from __future__ import annotations

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.joins import KINDS, Join
from tritonq.prepare.decide.layers import Layer
from tritonq.prepare.decide.places import returned_by
from tritonq.prepare.decide.plan import Plan
from tritonq.prepare.forwards.answered import AnsweredForward
from tritonq.prepare.record.dataflow import Call, ValueIndex

# Why such an operation stays in float.
BETWEEN_GRIDS = "computed in float between quantized tensors"
_INSTEAD = {"batch_norm": "a nn.BatchNorm in its place would become part of the layer before it"}


def float_operations(analysis: Analysis, plan: Plan) -> list[Call]:
    """Return the calls of functions that compute in float between quantized tensors, one call per place in a forward.

    Such a call reads a quantized tensor, or the result of another such call, and its result reaches a quantizer in the
    end. Layers and joins left in float are not among them: the plan lists these already. The run in eval mode is looked
    at. Of several such calls at one place the first is returned; the result is in order of execution.
    """
    behind: set[ValueIndex] = set()  # values that follow in float from quantized ones
    chain: list[Call] = []
    for call in _others(analysis, plan):
        dtypes = ((value, analysis.flow.values[value].dtype) for value in call.outputs)
        made = [value for value, dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
        reads_grid = any(value in plan.on_grid for value in call.inputs)
        if made and (not behind.isdisjoint(call.inputs) or (reads_grid and not analysis.keeps_grid(call))):
            behind.update(value for value in made if value not in plan.on_grid)
            chain.append(call)
    calls = (index for unary in plan.unary.values() for index in (*unary.absorbed, *unary.calls))
    wanted = set(plan.on_grid | plan.read).union(*(analysis.flow.calls[index].inputs for index in calls))
    told = {_place(call) for call in plan.float_functions.values()}
    found: dict[tuple[str, str, int], Call] = {}
    for call in reversed(chain):
        if not wanted.isdisjoint(call.outputs):
            wanted.update(call.inputs)
            if call.kind == "function" and not analysis.keeps_grid(call) and _place(call) not in told:
                found[_place(call)] = call
    return sorted(found.values(), key=lambda call: call.index)


def why_between(call: Call, analysis: Analysis) -> str:
    """Return the text for :attr:`LayerRecord.reason` of a call that computes in float between quantized tensors.

    The caller has made sure that the call is such a one (:func:`float_operations`). The text is ``"computed in float
    between quantized tensors"``. Four kinds of calls have more behind it, such as ``": it changes a tensor in place"``,
    the first that fits:

    - ``batch_norm``: that an ``nn.BatchNorm`` in its place would become part of the layer before it.
    - A call that could be a join: that one of its operands is a constant.
    - A call that changes a tensor in place and has no place in a forward that can be edited: that it changes a tensor
      in place.
    - A call whose result is that of its forward, if the forward keeps its branches: that the result is rounded behind
      the forward.
    """
    made = analysis.value_of(call)
    if call.name in _INSTEAD:
        more = _INSTEAD[call.name]
    elif call.name in KINDS and not analysis.constants.values.isdisjoint(call.inputs):
        more = "one of its operands is a constant"
    elif call.writes and analysis.site(call) is None:
        more = "it changes a tensor in place"
    elif (
        made is not None
        and isinstance(analysis.forward(call.owner), AnsweredForward)
        and returned_by(made, analysis) == call.owner
    ):
        more = "its forward keeps its branches, and what these return is rounded behind it"
    else:
        return BETWEEN_GRIDS
    return f"{BETWEEN_GRIDS}: {more}"


def _place(call: Call) -> tuple[str, str, int]:
    """Return ``(owner, operation, ordinal)`` of a call: a key of its place in a forward, the same in every run."""
    return call.owner, call.name, call.ordinal


def _others(analysis: Analysis, plan: Plan) -> list[Call]:
    """Return the calls in eval mode that became part of nothing quantized and compute no constants."""
    parts: tuple[Layer | Join, ...] = (*plan.layers, *plan.joins, *(join for join, _ in plan.float_joins))
    known = set(plan.erased).union(*(part.calls for part in parts), *(part.ends for part in parts))
    known.update(*(unary.calls for unary in plan.unary.values()))
    norms = {layer.batch_norm for layer in plan.layers if layer.batch_norm is not None}
    constants = analysis.constants.values
    return [
        call
        for call in analysis.flow.calls
        if call.run == 0
        and call.index not in known
        and call.owner not in norms
        and call.module_name not in norms
        and not constants.issuperset(call.outputs)
    ]
