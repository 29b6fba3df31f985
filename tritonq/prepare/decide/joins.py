"""Additions and concatenations that get a quantizer of their own."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.layers import relus_after
from tritonq.prepare.forwards.answered import AnsweredForward
from tritonq.prepare.forwards.graph import ForwardGraph
from tritonq.prepare.forwards.proof import Site
from tritonq.prepare.record.dataflow import Call, Ref, refs_in


@dataclass(frozen=True)
class Join:
    """An addition or concatenation of tensors, at one place in one forward.

    Attributes:
        kind: ``"add"`` or ``"cat"``.
        owner: module in whose forward it stands.
        site: where, or None if that forward can't be edited.
        reason: why not, or "".
        dim: axis of a concatenation.
        calls: its calls.
        ends: for each the ReLU that follows it and is absorbed, else the call itself.
        relus: the absorbed ReLU calls.
        ceiling: their upper bound; None without any.
    """

    kind: Literal["add", "cat"]
    owner: str
    site: Site | None
    reason: str
    dim: int
    calls: tuple[int, ...]
    ends: tuple[int, ...]
    relus: tuple[int, ...]
    ceiling: float | None


def find_joins(analysis: Analysis, kept: Container[int] = ()) -> list[Join]:
    """Every addition of two computed tensors and every concatenation, once per place.

    ``kept`` holds the calls of ReLUs that no addition may absorb.
    """
    joins: list[Join] = []
    seen: set[int] = set()
    for call in analysis.flow.calls:
        if call.kind == "function" and call.index not in seen and operands(call, analysis):
            joins.append(_join(call, analysis, kept))
            seen.update(joins[-1].calls)
    return joins


def operands(call: Call, analysis: Analysis) -> tuple[int, ...]:
    """The values that an addition or concatenation joins; empty for anything else, and for sums with constants."""
    if call.name == "add":
        items = tuple(call.args) + tuple(value for key, value in call.kwargs.items() if key in ("input", "other"))
        extra = [key for key, value in call.kwargs.items() if key not in ("input", "other") and value != 1]
        if len(items) != 2 or extra or not all(isinstance(item, Ref) for item in items):
            return ()
    elif call.name == "cat":
        parts = call.args[0] if call.args else call.kwargs.get("tensors")
        # One tensor alone is passed through.
        items = parts if isinstance(parts, tuple) and len(parts) > 1 and "out" not in call.kwargs else ()
    else:
        return ()
    values = tuple(value for item in items for value in refs_in(item))
    records = [analysis.flow.values[value] for value in values]
    constant = [value in analysis.constants.values for value in values]
    computed = not (all(constant) if call.name == "cat" else any(constant))
    floating = all(record.dtype.is_floating_point for record in records)
    return values if computed and floating and len(values) == len(items) else ()


def _join(call: Call, analysis: Analysis, kept: Container[int]) -> Join:
    calls = analysis.calls_like(call)
    site, reason = analysis.site(call), ""
    # One place in the source may be reached by different calls where a forward branches.
    alike = all(other.name == call.name and operands(other, analysis) for other in calls)
    if not alike or (site is not None and any(analysis.site(other) != site for other in calls)):
        site, reason = None, "its forward does different things in different calls"
    elif site is None:
        graph = analysis.forward(call.owner)
        why = "it differs in training" if isinstance(graph, ForwardGraph) else str(graph)
        if isinstance(graph, AnsweredForward):
            why = "it changes a tensor in place"
        reason = f"the forward of {call.owner or 'the model'} can't be edited: {why}"
    elif not analysis.runs_in_all_modes(calls):
        site, reason = None, analysis.missing_mode(calls)
    takes_relu = site is not None and call.name == "add"
    absorbed, ceiling = relus_after(calls, analysis, kept) if takes_relu else ([], None)
    return Join(
        kind="add" if call.name == "add" else "cat",
        owner=call.owner,
        site=site,
        reason=reason,
        dim=_dim(call) if call.name == "cat" else 0,
        calls=tuple(other.index for other in calls),
        ends=tuple(other.index for other in (absorbed or calls)),
        relus=tuple(relu.index for relu in absorbed),
        ceiling=ceiling,
    )


def _dim(call: Call) -> int:
    dim: Any = call.kwargs.get("dim", call.kwargs.get("axis", call.args[1] if len(call.args) > 1 else 0))
    return int(dim)
