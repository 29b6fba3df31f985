"""Tensors that are rounded with the join that they enter, and not before, and those that islands read unrounded.

A convolution and the addition behind it are one operation in TensorRT as long as nothing is rounded between the two,
and the parts of a concatenation lie on the grid of its result there. Elsewhere a qconfig may ask for the same, since it
costs less accuracy at few bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.islands import enters_island
from tritonq.prepare.decide.joins import CONCATENATIONS, Join
from tritonq.prepare.decide.layers import Layer
from tritonq.prepare.decide.places import results
from tritonq.prepare.decide.plan import PlannedQuantizer
from tritonq.qconfig import QConfig

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Unrounded:
    """Which results of layers and of quantizers behind functions wait for a join.

    Attributes:
        analysis: the model and its record.
        joins: those that get a quantizer.
        qconfig_of: the qconfig of a module, by its name.
        layers: names of the layers without an output quantizer.
        values: the values that stay unrounded.
        makers: the layers of those that layers make.
    """

    analysis: Analysis
    joins: Sequence[Join]
    qconfig_of: Callable[[str], QConfig | None]
    layers: set[str] = field(default_factory=set)
    values: set[int] = field(default_factory=set)
    makers: dict[int, Layer] = field(default_factory=dict)

    def add_layers(self, layers: Sequence[Layer]) -> None:
        """Find the layers whose results joins alone read, and may read unrounded."""
        fused: set[int] = set()  # additions that have their one summand
        # A residual's own convolution comes first, then the one that fits its shortcut.
        for position in (0, 1):
            for layer in layers:
                qconfig = self.qconfig_of(layer.home)
                if layer.name in self.layers or qconfig is None:
                    continue
                values = results((self.analysis.flow.calls[end] for end in layer.ends), self.analysis)
                entered = [self._entered(value) for value in values]
                if len(values) < len(layer.ends):
                    continue
                waits = self._waits_for_island(values, qconfig)
                if not waits and not self._may_wait(layer, qconfig, entered, position, fused):
                    continue
                fused.update(call for _, call, _ in filter(None, entered))
                self.layers.add(layer.name)
                self.values.update(values)
                self.makers.update(dict.fromkeys(values, layer))

    def add_joins(self) -> list[Join]:
        """Find the joins whose results islands alone read, and may read unrounded, and return them."""
        found: list[Join] = []
        for join in self.joins:
            qconfig, ends = self.qconfig_of(join.owner), [self.analysis.flow.calls[end] for end in join.ends]
            values = results(ends, self.analysis)
            if qconfig is not None and len(values) == len(ends) and self._waits_for_island(values, qconfig):
                found.append(join)
                self.values.update(values)
        return found

    def _waits_for_island(self, values: Sequence[int], qconfig: QConfig) -> bool:
        return (
            qconfig.islands == "float" and bool(values) and all(enters_island(value, self.analysis) for value in values)
        )

    def _may_wait(
        self,
        layer: Layer,
        qconfig: QConfig,
        entered: list[tuple[str, int, int] | None],
        position: int,
        fused: set[int],
    ) -> bool:
        kinds = {None if found is None else found[0] for found in entered}
        if kinds == {"add"} and not qconfig.round_summands:
            return True
        if not qconfig.find_target().fuses_joins:
            return False
        if kinds and kinds <= CONCATENATIONS:
            return True
        is_free = all(found is not None and found[1] not in fused and found[2] == position for found in entered)
        return kinds == {"add"} and is_free and layer.ceiling is None and issubclass(layer.row[0], _CONVOLUTIONS)

    def waits_for_concatenation(self, quantizer: PlannedQuantizer, values: Sequence[int]) -> bool:
        """Whether concatenations alone read what a quantizer behind a function would round, and may round it."""
        if not quantizer.qconfig.find_target().fuses_joins:
            return False
        entered = [self._entered(value) for value in values]
        return bool(entered) and all(found is not None and found[0] in CONCATENATIONS for found in entered)

    def _entered(self, value: int) -> tuple[str, int, int] | None:
        """Return the kind of the join that alone reads a value, its call, and as which operand."""
        flow = self.analysis.flow
        for moved in self._moved(value):
            reader = flow.single_consumer(moved)
            kind = None if reader is None else self._kinds.get(reader.index)
            if reader is not None and kind is not None:
                return kind, reader.index, reader.inputs.index(moved)
        return None

    def _moved(self, value: int) -> Iterator[int]:
        """Yield a value, and what calls that keep its grid make of it, one after the other."""
        yield value
        reader = self.analysis.flow.single_consumer(value)
        moved = None if reader is None else self.analysis.value_of(reader)
        if reader is not None and moved is not None and self.analysis.keeps_grid(reader):
            yield from self._moved(moved)

    @property
    def _kinds(self) -> dict[int, str]:
        return {call: join.kind for join in self.joins for call in join.calls}
