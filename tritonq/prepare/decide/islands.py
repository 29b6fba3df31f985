"""Find islands, and the tensors at their ends. An *island* is a softmax or norm in float between quantized tensors.

The field ``islands`` of a qconfig says where these tensors are rounded. None: if a quantized layer or join makes or
reads them. ``"float"``: not before the island. ``"rounded"``: before and behind it.
"""

from __future__ import annotations

from collections.abc import Iterator

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.record.dataflow import ValueIndex


def enters_island(value: ValueIndex, analysis: Analysis) -> bool:
    """Whether a value leads, by one reader after the other, to the first input of an island and to nothing else.

    On the way it may be moved, scaled or shifted by constants, or shifted by an attention mask. False if nothing or
    several calls read it or a result on the way, even if all of them are islands, or if the model returns one of these.
    """
    return analysis.enters(value, analysis.is_island)


def ends_of_islands(analysis: Analysis) -> Iterator[tuple[str, ValueIndex]]:
    """Yield ``(module name, value)`` twice for each recorded call of an island: its first input, then its result.

    The module is the one whose qconfig counts: the island itself, or the owner of a function ("" for the model).
    """
    for call in analysis.flow.calls:
        result = analysis.value_of(call)
        if analysis.is_island(call) and call.inputs and result is not None:
            name = call.owner if call.module_name is None else call.module_name
            yield name, call.inputs[0]
            yield name, result
