"""Join operations of one tensor that follow each other into one, which is rounded once, behind the last of them.

Clips (ReLU, ReLU6, clamp) that follow each other are one clip. Arithmetic with a number, such as ``x * 2``, is one
function together with the clips, functions and arithmetic beside it. A *row* is such a sequence of calls, from first to
last.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from tritonq.nn.clip import Clipping
from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.arithmetic import arithmetic_of_call, has_number
from tritonq.prepare.decide.clips import bounds_of_call
from tritonq.prepare.decide.functions import function_of_call
from tritonq.prepare.decide.layers import has_hooks
from tritonq.prepare.forwards.graph import ForwardGraph
from tritonq.prepare.record.dataflow import Call, CallIndex, ValueIndex
from tritonq.reference.functions import Function


class Chains:
    """Find the calls that become one operation with the call behind them.

    Args:
        analysis: the model and its record.
        kept: indices of calls that stay: ReLUs that are part of a layer or join, and calls that can't be removed from a
            forward.
        grids: indices of the values that a quantizer rounds, or will round.
    """

    def __init__(self, analysis: Analysis, kept: Container[CallIndex], grids: Container[ValueIndex | None]) -> None:
        self._analysis, self._kept, self._grids = analysis, kept, grids

    def row(self, call: Call) -> tuple[Call, ...]:
        """Return the calls that become one operation, the last of which is ``call``, from first to last.

        Before ``call`` stand those whose numbers are fixed and whose result the next one alone reads, without a grid
        or hook between: clips before a clip, and any clip, arithmetic or function where one of two neighbours is
        arithmetic with a number. A call in the middle of a longer row gives the part up to it. If no other call joins
        it, or if it is neither clip, arithmetic nor function, that is ``(call,)``.
        """
        found: tuple[Call, ...] = (call,)
        while _function_of_step(found[0]) is not None:
            before = self._analysis.flow.producer(self._analysis.unwrapped(found[0].inputs[0]))
            if before is None or not self._become_one(before, found[0]):
                break
            found = (before, *found)
        return found

    def last_clip(self, call: Call) -> Call:
        """Return the last of the clips that follow a clip and become one with it; ``call`` itself if there are none.

        A plain ReLU at the end is not the last clip: it keeps the grid of what it reads, so the quantizer stands before
        it.
        """
        last, found = call, call
        while bounds_of_call(found) is not None and (behind := self._analysis.follower(found)) is not None:
            if bounds_of_call(behind) is None or not self._become_one(found, behind):
                break
            found = behind
            last = last if self._analysis.is_relu(found) else found
        return last

    def has_fixed_number(self, call: Call) -> bool:
        """Whether the numbers of a clip or of arithmetic are constants of the forward, the same in every call.

        True for a call of a module, and for a call without further arguments, such as ``F.relu(x)``. Any other call of
        a function needs a forward that is a graph, in which nothing computes its arguments.
        """
        if call.kind == "module" or (len(call.args) == 1 and set(call.kwargs) <= {"inplace"}):
            return True
        forward, site = self._analysis.forward(call.owner), self._analysis.site(call)
        return isinstance(forward, ForwardGraph) and site is not None and forward.has_constant_arguments(site.node)

    def _become_one(self, before: Call, call: Call) -> bool:
        """Whether ``before``, which reads a float tensor, and ``call``, which reads its result, become one operation.

        Both are clips, or one of the two is arithmetic with a number and ``before`` is a clip, function or arithmetic
        with a fixed number. ``call`` alone reads the result, which lies on no grid, and ``before`` is not among those
        that stay. No hooks see what ``before`` is given or what stands between the two.
        """
        if not all(self._analysis.flow.values[value].dtype.is_floating_point for value in before.inputs):
            return False
        is_alike = bounds_of_call(before) is not None and bounds_of_call(call) is not None
        if not is_alike and arithmetic_of_call(before) is None and arithmetic_of_call(call) is None:
            return False
        if before.index in self._kept or self._analysis.value_of(before) in self._grids:
            return False
        if has_hooks(before.target) or has_hooks(call.target, before=True):
            return False
        is_read_alone = self._analysis.follower(before) == call
        return is_read_alone and _function_of_step(before) is not None and self.has_fixed_number(before)


def joined_clips(row: Sequence[Call]) -> Clipping | None:
    """Return the one clip that a row of clips amounts to; None for an empty row, or if a call is no clip."""
    found = [bounds_of_call(call) for call in row]
    joined = Clipping(-math.inf, math.inf) if found else None
    for bounds in found:
        joined = None if bounds is None or joined is None else joined.then(bounds)
    return joined


def joined_function(row: Sequence[Call]) -> Function | None:
    """Return the one ``Function`` that a row of calls computes, the first call's function first.

    None if no call is arithmetic with a number, or if some call is neither clip, arithmetic nor function.
    """
    if not any(arithmetic_of_call(call) for call in row):
        return None
    steps = [_function_of_step(call) for call in row]
    joined = steps[0]
    for step in steps[1:]:
        joined = None if step is None or joined is None else joined.then(step)
    return joined


def is_checked(call: Call) -> bool:
    """Whether a forward that keeps its branches must compare a call's numbers with the recorded ones when it runs.

    That is so for arithmetic with a number, and for clips that are no modules, ``F.relu`` included.
    """
    return has_number(call) or (bounds_of_call(call) is not None and call.kind == "function")


def _function_of_step(call: Call) -> Function | None:
    """Return the function that a call computes: a clip, arithmetic, or a function such as SiLU.

    None for other calls.
    """
    bounds = bounds_of_call(call)
    if bounds is not None:
        return bounds.function
    return arithmetic_of_call(call) or function_of_call(call)
