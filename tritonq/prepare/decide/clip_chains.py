"""Clips one behind the other, which are one clip: rounded once, behind the last of them."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable

from tritonq.nn.clip import Clipping
from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.clips import bounds_of_call
from tritonq.prepare.forwards.graph import ForwardGraph
from tritonq.prepare.record.dataflow import Call


class ClipChains:
    """Finds clips that another one makes superfluous by taking their bounds.

    Args:
        analysis: the model and its record.
        kept: calls that stay: ReLUs of a layer or join, and what can't be taken out of a forward.
    """

    def __init__(self, analysis: Analysis, kept: Container[int]) -> None:
        self._analysis, self._kept = analysis, kept

    def before(self, call: Call) -> tuple[Call, ...]:
        """Return the clips before a clip that become part of it, from first to last; empty for other calls."""
        found: tuple[Call, ...] = ()
        while bounds_of_call(call) is not None:
            before = self._producer(call.inputs[0])
            if before is None or before.index in self._kept or self._analysis.follower(before) != call:
                break
            if bounds_of_call(before) is None or not self._has_fixed_bounds(before):
                break
            found, call = (before, *found), before
        return found

    def last(self, call: Call) -> Call:
        """Return the clip that stands for a clip and those behind it; the call itself where there are none.

        A plain ReLU at the end keeps the grid of what it reads, so that the quantizer stands before it.
        """
        last, found = call, call
        while (behind := self._analysis.follower(found)) is not None and found in self.before(behind):
            found = behind
            last = last if self._analysis.is_relu(found) else found
        return last

    def _producer(self, value: int) -> Call | None:
        found = self._analysis.flow.producer(value)
        return self._producer(found.inputs[0]) if found is not None and self._analysis.is_identity(found) else found

    def _has_fixed_bounds(self, call: Call) -> bool:
        """Whether a forward can't call a clip with other bounds than the recorded ones."""
        if call.kind == "module" or (len(call.args) == 1 and set(call.kwargs) <= {"inplace"}):
            return True
        forward, site = self._analysis.forward(call.owner), self._analysis.site(call)
        return isinstance(forward, ForwardGraph) and site is not None and forward.has_constant_arguments(site.node)


def joined_bounds(clips: Iterable[Call]) -> Clipping | None:
    """Return the bounds of clips one behind the other as those of one; None where one has none, or without any."""
    found = [bounds_of_call(clip) for clip in clips]
    joined = Clipping(-math.inf, math.inf) if found else None
    for bounds in found:
        joined = None if bounds is None or joined is None else joined.then(bounds)
    return joined
