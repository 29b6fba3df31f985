"""Operations of one tensor, one behind the other, that are one: rounded once, behind the last of them.

Clips in a row are one clip. Arithmetic with a number is one function with a clip, a function or arithmetic beside it.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from tritonq.nn.clip import Clipping
from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.arithmetic import arithmetic_of_call, has_number
from tritonq.prepare.decide.clips import bounds_of_call
from tritonq.prepare.decide.functions import function_of_call
from tritonq.prepare.forwards.graph import ForwardGraph
from tritonq.prepare.record.dataflow import Call
from tritonq.reference.functions import Function


class Chains:
    """Finds calls that the one behind them makes superfluous by doing what they do, too.

    Args:
        analysis: the model and its record.
        kept: calls that stay: ReLUs of a layer or join, and what can't be taken out of a forward.
        grids: the values behind which a quantizer stands, or will.
    """

    def __init__(self, analysis: Analysis, kept: Container[int], grids: Container[int | None]) -> None:
        self._analysis, self._kept, self._grids = analysis, kept, grids

    def row(self, call: Call) -> tuple[Call, ...]:
        """Return the calls that become part of a call, from first to last, and the call."""
        found: tuple[Call, ...] = (call,)
        while _function_of_step(found[0]) is not None:
            before = self._producer(found[0].inputs[0])
            if before is None or not self._joins(before, found[0]):
                break
            found = (before, *found)
        return found

    def last_clip(self, call: Call) -> Call:
        """Return the clip that stands for a clip and those behind it; the call itself where there are none.

        A plain ReLU at the end keeps the grid of what it reads, so that the quantizer stands before it.
        """
        last, found = call, call
        while bounds_of_call(found) is not None and (behind := self._analysis.follower(found)) is not None:
            if bounds_of_call(behind) is None or not self._joins(found, behind):
                break
            found = behind
            last = last if self._analysis.is_relu(found) else found
        return last

    def has_fixed_number(self, call: Call) -> bool:
        """Whether a forward can't call a clip or arithmetic with other numbers than the recorded ones."""
        if call.kind == "module" or (len(call.args) == 1 and set(call.kwargs) <= {"inplace"}):
            return True
        forward, site = self._analysis.forward(call.owner), self._analysis.site(call)
        return isinstance(forward, ForwardGraph) and site is not None and forward.has_constant_arguments(site.node)

    def _joins(self, before: Call, call: Call) -> bool:
        """Whether a call and the one behind it are one operation."""
        is_alike = bounds_of_call(before) is not None and bounds_of_call(call) is not None
        if not is_alike and arithmetic_of_call(before) is None and arithmetic_of_call(call) is None:
            return False
        if before.index in self._kept or self._analysis.value_of(before) in self._grids:
            return False
        is_read_alone = self._analysis.follower(before) == call
        return is_read_alone and _function_of_step(before) is not None and self.has_fixed_number(before)

    def _producer(self, value: int) -> Call | None:
        found = self._analysis.flow.producer(value)
        return self._producer(found.inputs[0]) if found is not None and self._analysis.is_identity(found) else found


def joined_clips(row: Sequence[Call]) -> Clipping | None:
    """Return the one clip that a row of clips amounts to; None for an empty row, or where a call is no clip."""
    found = [bounds_of_call(call) for call in row]
    joined = Clipping(-math.inf, math.inf) if found else None
    for bounds in found:
        joined = None if bounds is None or joined is None else joined.then(bounds)
    return joined


def joined_function(row: Sequence[Call]) -> Function | None:
    """Return the one function that a row of calls computes.

    None where no call is arithmetic with a number, or where some call is no function of one tensor.
    """
    if not any(arithmetic_of_call(call) for call in row):
        return None
    steps = [_function_of_step(call) for call in row]
    joined = steps[0]
    for step in steps[1:]:
        joined = None if step is None or joined is None else joined.then(step)
    return joined


def is_checked(call: Call) -> bool:
    """Whether a forward that keeps its branches has to check the numbers of a clip or of arithmetic when it runs."""
    return has_number(call) or (bounds_of_call(call) is not None and call.kind == "function")


def _function_of_step(call: Call) -> Function | None:
    bounds = bounds_of_call(call)
    if bounds is not None:
        return bounds.function
    return arithmetic_of_call(call) or function_of_call(call)
