"""Find results that are not rounded themselves: a join rounds them, or an island reads them unrounded.

A join is an addition, concatenation or other operation of several tensors; an island is a softmax or norm in float.
TensorRT computes a convolution and the addition behind it as one operation if nothing is rounded between the two, and
puts the parts of a concatenation on the grid of its result. For other engines a qconfig may ask for the same, since it
costs less accuracy at few bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.islands import enters_island
from tritonq.prepare.decide.joins import CONCATENATIONS, Join
from tritonq.prepare.decide.layers import Layer
from tritonq.prepare.decide.places import results
from tritonq.prepare.decide.plan import PlannedQuantizer
from tritonq.prepare.record.dataflow import CallIndex, ValueIndex
from tritonq.qconfig import QConfig

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Unrounded:
    """Collect the results of layers and joins that stay unrounded.

    The caller gives ``analysis``, ``joins`` and ``qconfig_of``. The others begin empty: :meth:`add_layers` adds to all
    three, :meth:`add_joins` to ``values``.

    Attributes:
        analysis: the model and its record.
        joins: the joins that get a quantizer.
        qconfig_of: returns the qconfig of a module, given its name.
        layers: names of the layers that get no output quantizer.
        values: indices of the values that stay unrounded.
        makers: for those of these values that a layer returns, the layer.
    """

    analysis: Analysis
    joins: Sequence[Join]
    qconfig_of: Callable[[str], QConfig | None]
    layers: set[str] = field(default_factory=set)
    values: set[ValueIndex] = field(default_factory=set)
    makers: dict[ValueIndex, Layer] = field(default_factory=dict)

    def add_layers(self, layers: Sequence[Layer]) -> None:
        """Find the layers that do not round their results, because only joins or islands read these.

        A layer is one of them if one call alone reads each of its results (one result for each call of the layer),
        directly or after moves and plain ReLUs, and if one of these lines is true of all these readers:

        - islands, if the layer's qconfig has ``islands="float"``; results may be scaled and shifted on the way;
        - additions, if the qconfig has ``round_summands=False``;
        - concatenations, if the target (the engine) fuses joins;
        - additions, if the target fuses joins and the layer is a convolution without ReLU. Of the two summands of an
          addition only one stays unrounded for this reason: the first if its layer allows it, else the second.

        Their names go into ``layers``, their results into ``values`` and ``makers``.
        """
        fused: set[CallIndex] = set()  # additions that have their one summand
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
        """Return the joins whose results only islands read, where the qconfig has ``islands="float"``.

        That is the qconfig of the module in whose forward the join stands. Their results are added to ``values``.
        """
        found: list[Join] = []
        for join in self.joins:
            qconfig, ends = self.qconfig_of(join.owner), [self.analysis.flow.calls[end] for end in join.ends]
            values = results(ends, self.analysis)
            if qconfig is not None and len(values) == len(ends) and self._waits_for_island(values, qconfig):
                found.append(join)
                self.values.update(values)
        return found

    def _waits_for_island(self, values: Sequence[ValueIndex], qconfig: QConfig) -> bool:
        """Whether only islands read all of these values, and the qconfig leaves islands' inputs unrounded."""
        return (
            qconfig.islands == "float" and bool(values) and all(enters_island(value, self.analysis) for value in values)
        )

    def _may_wait(
        self,
        layer: Layer,
        qconfig: QConfig,
        entered: list[tuple[str, int, int] | None],
        position: int,
        fused: set[CallIndex],
    ) -> bool:
        """Whether the joins that read a layer's results may round them instead of the layer.

        Additions may if the qconfig does not round summands. If the target fuses joins, so may concatenations, and an
        addition for one convolution without ReLU.

        Args:
            layer: the layer.
            qconfig: its qconfig.
            entered: for each of its results what :meth:`_entered` returned.
            position: operand of an addition (0 or 1) at which its fused summand may stand in this pass.
            fused: indices of additions that have their one unrounded summand already.
        """
        kinds = {None if found is None else found[0] for found in entered}
        if kinds == {"add"} and not qconfig.round_summands:
            return True
        if not qconfig.find_target().fuses_joins:
            return False
        if kinds and kinds <= CONCATENATIONS:
            return True
        is_free = all(found is not None and found[1] not in fused and found[2] == position for found in entered)
        return kinds == {"add"} and is_free and layer.ceiling is None and issubclass(layer.row[0], _CONVOLUTIONS)

    def waits_for_concatenation(self, quantizer: PlannedQuantizer, values: Sequence[ValueIndex]) -> bool:
        """Whether a quantizer can be left out, since concatenations round what it would round.

        That is so if nothing else reads the values, directly or after moves and plain ReLUs, and if the quantizer's
        target (an engine) fuses joins.

        Args:
            quantizer: the planned quantizer.
            values: indices of the values that it would round.
        """
        if not quantizer.qconfig.find_target().fuses_joins:
            return False
        entered = [self._entered(value) for value in values]
        return bool(entered) and all(found is not None and found[0] in CONCATENATIONS for found in entered)

    def _entered(self, value: ValueIndex) -> tuple[str, int, int] | None:
        """Return ``(kind, index of the call, operand)`` of the join that alone reads a value; None if there is none.

        The operand is the value's position among those that the join reads, from 0.
        """
        flow = self.analysis.flow
        for moved in self._moved(value):
            reader = flow.single_consumer(moved)
            kind = None if reader is None else self._kinds.get(reader.index)
            if reader is not None and kind is not None:
                return kind, reader.index, reader.inputs.index(moved)
        return None

    def _moved(self, value: ValueIndex) -> Iterator[ValueIndex]:
        """Yield a value, then the result of its only reader if that only moves values or is a plain ReLU, and so on."""
        yield value
        reader = self.analysis.flow.single_consumer(value)
        moved = None if reader is None else self.analysis.value_of(reader)
        if reader is not None and moved is not None and self.analysis.keeps_grid(reader):
            yield from self._moved(moved)

    @cached_property
    def _kinds(self) -> dict[int, str]:
        """The kind of join for each index of a call."""
        return {call: join.kind for join in self.joins for call in join.calls}
