"""Islands, softmax and norms in float between quantized tensors, and where the tensors at their ends are rounded.

A qconfig's ``islands`` says it: None, where something quantized makes or reads them; ``"float"``, not before the
island; ``"rounded"``, at both of its ends.
"""

from __future__ import annotations

from collections.abc import Iterator

from tritonq.prepare.decide.analysis import Analysis


def enters_island(value: int, analysis: Analysis) -> bool:
    """Whether an island alone reads a value, moved, scaled and shifted by constants on the way."""
    call = analysis.flow.single_consumer(value)
    if call is None or analysis.flow.values[value].is_output:
        return False
    if analysis.is_island(call):
        return call.inputs[:1] == (value,)
    result = analysis.value_of(call)
    return result is not None and analysis.source_of(call) == value and enters_island(result, analysis)


def ends_of_islands(analysis: Analysis) -> Iterator[tuple[str, int]]:
    """Yield the value that each island reads and the one that it returns, after the name of the qconfig's module."""
    for call in analysis.flow.calls:
        result = analysis.value_of(call)
        if analysis.is_island(call) and call.inputs and result is not None:
            name = call.owner if call.module_name is None else call.module_name
            yield name, call.inputs[0]
            yield name, result
