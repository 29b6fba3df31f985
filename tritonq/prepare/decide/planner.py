"""Make a plan: which layers, joins and quantizers a recorded model gets, before anything is changed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from tritonq.prepare.decide.activations import ActivationChoice
from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.called_layers import exclusive_state
from tritonq.prepare.decide.chains import Chains
from tritonq.prepare.decide.erasures import erasures, stuck_relus
from tritonq.prepare.decide.find_layers import NO_QCONFIG, LayerSearch
from tritonq.prepare.decide.functions import joins_layer
from tritonq.prepare.decide.islands import ends_of_islands
from tritonq.prepare.decide.joins import NO_NEIGHBOUR, Join, find_joins, operands
from tritonq.prepare.decide.layers import Layer
from tritonq.prepare.decide.places import grid_behind, is_unread, place_of, results
from tritonq.prepare.decide.plan import GridSource, Plan, PlannedQuantizer
from tritonq.prepare.decide.readers import Reading, SharedReading, share_readings
from tritonq.prepare.decide.unary import PlannedUnary, find_unary, is_unary, operands_of_unary, source_of
from tritonq.prepare.decide.unrounded import Unrounded
from tritonq.prepare.record.dataflow import Call, CallIndex, ValueIndex
from tritonq.qconfig import QConfig
from tritonq.qconfig_mapping import Place


def make_plan(
    analysis: Analysis,
    swapped: Container[type[nn.Module]],
    qconfigs: Mapping[nn.Module, QConfig | None],
    inputs: Place | None = None,
) -> Plan:
    """Return the plan for a recorded model: its fusions, joins and quantizers.

    Args:
        analysis: the model and its record.
        swapped: the float types that have a quantized form.
        qconfigs: the qconfig of each module, None to leave it in float.
        inputs: the rule of a `QConfigMapping` for the model's inputs; None in it: they stay in float; None: no rule.
    """
    activations = ActivationChoice(analysis, qconfigs, inputs)
    kept: frozenset[CallIndex] = frozenset()
    while True:
        planner = _Planner(analysis, swapped, qconfigs, activations, kept)
        plan = planner.plan()
        stuck = stuck_relus(analysis, plan)
        if not stuck:
            return plan
        kept |= stuck


@dataclass
class _Planner:
    """The work of :func:`make_plan`: ReLUs in ``kept`` join nothing, ``grids`` has what gives values their grids."""

    analysis: Analysis
    swapped: Container[type[nn.Module]]
    qconfigs: Mapping[nn.Module, QConfig | None]
    activations: ActivationChoice
    kept: frozenset[CallIndex] = frozenset()
    grids: dict[ValueIndex, GridSource] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    single_mode: set[str] = field(default_factory=set)
    float_functions: dict[str, Call] = field(default_factory=dict)
    float_joins: list[tuple[Join, str]] = field(default_factory=list)
    quantizers: list[PlannedQuantizer] = field(default_factory=list)
    # Results that are rounded with the join that they enter.
    unrounded: set[ValueIndex] = field(default_factory=set)
    makers: dict[ValueIndex, Layer] = field(default_factory=dict)
    chains: Chains = field(init=False)
    # Those that stand where layers and joins read them, by reader and operand.
    at_readers: dict[tuple[int, int], PlannedQuantizer] = field(default_factory=dict)

    def plan(self) -> Plan:
        layers = self._layers()
        self._keep_apart(layers)
        clipped = frozenset(layer.name for layer in layers if self._quantized_when_clipped(layer))
        behind = {layer.name: grid_behind(layer.ends, self.analysis, self.grids, self.chains) for layer in layers}
        outputs = {name: grid for name, grid in behind.items() if grid is not None and name in clipped}
        for layer in layers:
            if layer.name not in clipped:
                self._assign(layer.ends, layer)
        joins = self._relevant(find_joins(self.analysis, self.kept), layers)
        self._keep_apart((*layers, *joins))
        summands, float_results = self._leave_unrounded(joins, layers)
        demands = self._demands(layers, joins)
        at_readers: list[Reading] = []
        # In order of execution: what is downstream of a quantizer that was just placed needs none.
        for root, readings in sorted(demands.items()):
            if self._grid(root) is None and not self._place_where_made(root, readings[0].qconfig, readings[0].home):
                at_readers += readings
        at_readers += self._read_several_grids(layers)
        for shared in share_readings(at_readers):
            self._place_at_readers(shared)
        self._quantize_between()
        self._round_islands()
        parts: tuple[Layer | Join, ...] = (*layers, *joins)
        unary = self._unary()
        erased = frozenset(relu for part in parts for relu in part.relus)
        erased |= {clip for operation in unary.values() for clip in operation.absorbed}
        modules, nodes = erasures(self.analysis, erased)
        return Plan(
            layers=tuple(layers),
            clipped=clipped,
            outputs=outputs,
            summands=summands,
            unread=frozenset(layer.name for layer in layers if is_unread(layer.ends, self.analysis)),
            joins=tuple(joins),
            float_results=float_results,
            quantizers=tuple(self.quantizers),
            inputs=self._inputs(layers),
            operands={join: self._operands(join) for join in joins if join.knows_operands},
            unary=unary,
            erased=erased,
            erased_modules=modules,
            erased_nodes=nodes,
            float_reasons=self.reasons,
            single_mode=frozenset(self.single_mode),
            float_functions=self.float_functions,
            float_joins=tuple(self.float_joins),
            exclusive_state=exclusive_state(filter(None, (layer.function for layer in layers)), self.analysis),
            on_grid=frozenset(
                value.index for value in self.analysis.flow.values if self._grid(value.index) is not None
            ),
            read=frozenset(value for part in parts for value in self._reads(part)),
        )

    def _keep_apart(self, parts: Iterable[Layer | Join]) -> None:
        """Let ReLUs that are part of one of these layers or joins become part of nothing else: make ``chains`` anew."""
        self.chains = Chains(self.analysis, self.kept.union(*(part.relus for part in parts)), self.grids)

    def _layers(self) -> list[Layer]:
        search = LayerSearch(
            self.analysis, self.swapped, self.qconfigs, self.kept, self.reasons, self.single_mode, self.float_functions
        )
        return search.layers()

    def _quantized_when_clipped(self, layer: Layer) -> bool:
        """Place a layer's quantizer behind the ReLU6 or the like that alone reads it; return whether that was done.

        Two in a row would round twice. Functions such as SiLU count if the target computes them together with a layer.
        """
        if not issubclass(layer.row[0], (nn.modules.conv._ConvNd, nn.Linear)):
            return False
        ends = [self.analysis.flow.calls[index] for index in layer.ends]
        clips = [self.analysis.follower(call) for call in ends]
        values = [None if clip is None else self.analysis.value_of(self.chains.last_clip(clip)) for clip in clips]
        found = [value for value in values if value is not None]
        qconfig = self._qconfig(layer.home)
        if qconfig is None or not found or len(found) < len(ends):
            return False
        fuses = qconfig.find_target().fuses_functions or qconfig.islands == "float"
        if not all(clip is not None and joins_layer(clip, fuses) for clip in clips):
            return False
        places = [place_of(value, self.analysis) for value in found]
        if any(place.where == "consumer" or not set(place.values) <= set(found) for place in places):
            return False  # what else comes through there would share the grid
        for value in found:
            if value not in self.grids:
                self._place_where_made(value, qconfig, layer.home)
        return True

    def _leave_unrounded(self, joins: list[Join], layers: list[Layer]) -> tuple[frozenset[str], tuple[Join, ...]]:
        """Leave results unrounded that joins or islands read so; return names of layers, and such joins."""
        found = Unrounded(self.analysis, joins, self._qconfig)
        found.add_layers(layers)
        float_results = found.add_joins()
        for quantizer in list(self.quantizers):
            values = [value for value, grid in self.grids.items() if grid is quantizer]
            if found.waits_for_concatenation(quantizer, values):
                self.quantizers.remove(quantizer)
                found.values.update(values)
        for value in found.values:
            self.grids.pop(value, None)
        self.unrounded, self.makers = found.values, found.makers
        return frozenset(found.layers), tuple(float_results)

    def _read_several_grids(self, layers: list[Layer]) -> list[Reading]:
        """Return the readings of layers whose calls read different grids, if the target wants one grid for a layer.

        Such a layer gets an input quantizer of its own, so that its bias has one unit in all calls.
        """
        found: list[Reading] = []
        for layer in layers:
            qconfig, read = self._qconfig(layer.home), self._operands_read(layer)
            grids = [self._grid(value) for _, _, value in read]
            is_one = None in grids or all(grid is grids[0] for grid in grids)
            # Reproduced systems name no target: their numbers stay.
            if is_one or qconfig is None or qconfig.target is None or not qconfig.find_target().reads_one_grid:
                continue
            chosen = self.activations.choose(read[0][2], qconfig)
            if chosen is not None:
                found += [Reading(layer, operand, value, call, chosen) for call, operand, value in read]
        return found

    def _assign(self, calls: tuple[CallIndex, ...], grid: GridSource) -> None:
        if isinstance(grid, Layer) and issubclass(grid.row[0], (nn.Embedding, nn.EmbeddingBag)):
            return  # rows of a table have no output quantizer
        for index in calls:
            value = self.analysis.value_of(self.analysis.flow.calls[index])
            if value is not None:
                self.grids[value] = grid

    def _relevant(self, joins: list[Join], layers: list[Layer]) -> list[Join]:
        """Return the joins that read from, or are read by, a quantized layer or another such join.

        Others stay in float, as does one that can't become a module, and the reason is noted.
        """
        candidates = [join for join in joins if self._qconfig(join.owner) is not None]
        self.float_joins += [(join, NO_QCONFIG) for join in joins if self._qconfig(join.owner) is None]
        read: dict[int, list[int]] = {}  # for values that a candidate takes its grid from, the candidates
        made: dict[int, list[int]] = {}  # for values that a candidate returns, the candidates
        pending: list[int] = []
        for index, join in enumerate(candidates):
            sources = {source for value in self._reads(join) for source in self._upwards(value, join.is_product)}
            if any(source in self.grids for source in sources):
                pending.append(index)
            for source in sources:
                read.setdefault(source, []).append(index)
            for end in results((self.analysis.flow.calls[end] for end in join.ends), self.analysis):
                made.setdefault(end, []).append(index)
        for layer in layers:
            for value in self._reads(layer):
                pending += [index for source in self._upwards(value) for index in made.get(source, ())]
        met: set[int] = set()
        while pending:
            index = pending.pop()
            join = candidates[index]
            is_new = index not in met
            met.add(index)
            if not is_new or join.site is None:
                continue
            for end in results((self.analysis.flow.calls[end] for end in join.ends), self.analysis):
                pending += read.get(end, ())
            for value in self._reads(join):
                pending += [above for source in self._upwards(value) for above in made.get(source, ())]
        self.float_joins += [
            (join, join.reason if index in met else NO_NEIGHBOUR)
            for index, join in enumerate(candidates)
            if index not in met or join.site is None
        ]
        found = [join for index, join in enumerate(candidates) if index in met and join.site is not None]
        for join in found:
            self._assign(join.ends, join)
        return found

    def _upwards(self, value: ValueIndex, through_norms: bool = False) -> Iterator[ValueIndex]:
        """Yield a value, the one it is computed from by a move, function or mean, and so on up to one on a grid."""
        found: ValueIndex | None = value
        while found is not None:
            yield found
            call = None if found in self.grids else self.analysis.flow.producer(found)
            found = None if call is None else source_of(call, self.analysis, self.chains, through_norms)

    def _demands(self, layers: list[Layer], joins: list[Join]) -> dict[ValueIndex, list[Reading]]:
        """Return the values that need a quantizer, each with the readings of layers and joins that demand it."""
        demands: dict[ValueIndex, list[Reading]] = {}
        parts: tuple[Layer | Join, ...] = (*layers, *joins)
        for part in parts:
            qconfig = self._qconfig(part.home)
            for call, operand, value in self._operands_read(part):
                root = self._root(value)
                record = self.analysis.flow.values[root]
                rounds = isinstance(part, Join) and part.rounds_constants
                is_kept = root in self.analysis.constants.values and not rounds
                if qconfig is None or root in self.grids or not record.dtype.is_floating_point or is_kept:
                    continue
                chosen = None if root in self.unrounded else self.activations.choose(root, qconfig)
                if chosen is not None:
                    read = self.analysis.unwrapped(value)
                    demands.setdefault(root, []).append(Reading(part, operand, read, call, chosen))
        return demands

    def _place_where_made(self, root: ValueIndex, qconfig: QConfig, like: str) -> bool:
        place = place_of(root, self.analysis)
        if place.where == "consumer":
            return False
        quantizer = PlannedQuantizer(
            where=place.where,
            owner=place.owner,
            value=root,
            node="" if place.site is None else place.site.node,
            label="" if place.site is None else place.site.label,
            in_place=place.site is not None and place.site.in_place,
            qconfig=qconfig,
            like=like,
        )
        self.grids.update(dict.fromkeys(place.values, quantizer))
        self.quantizers.append(quantizer)
        return True

    def _place_at_readers(self, shared: SharedReading) -> None:
        first = shared.readers[0].part
        record = self.analysis.flow.values[self._root(shared.value)]
        quantizer = PlannedQuantizer(
            where="consumer",
            owner="",
            value=shared.value,
            node="",
            label="",
            in_place=False,
            qconfig=shared.qconfig,
            like=first.home,
            consumers=shared.readers,
            input_path=record.path if record.source == "input" else (),
        )
        self.quantizers.append(quantizer)
        self.at_readers |= {(id(reader.part), reader.operand): quantizer for reader in shared.readers}

    def _round_islands(self) -> None:
        """Place quantizers before and behind islands, if a qconfig asks for them and no grid is known there."""
        for name, value in ends_of_islands(self.analysis):
            qconfig, root = self._qconfig(name), self._root(value)
            if qconfig is not None and qconfig.islands == "rounded" and root not in self.analysis.constants.values:
                chosen = self.activations.choose(root, qconfig)
                if chosen is not None and self.grids.keys().isdisjoint(self._upwards(root)):
                    self._place_where_made(root, chosen, name)

    def _quantize_between(self) -> None:
        """Place quantizers behind functions and means that stand between a grid and an operation whose result has one.

        Such operations of one tensor (the mean behind a Hardswish, say) can then be computed on codes.
        """
        for quantizer in list(self.quantizers):
            for value in operands_of_unary(quantizer, self.analysis, self.chains):
                for root in self._unary_before(value):
                    if not self._place_where_made(root, quantizer.qconfig, quantizer.like):
                        break

    def _unary_before(self, value: ValueIndex) -> list[ValueIndex]:
        """Return results of operations of one tensor that lead from a grid to a value, in order; empty if none do."""
        roots: list[ValueIndex] = []
        while (root := self._root(value)) not in self.grids:
            call = self.analysis.flow.producer(root)
            if call is None or not is_unary(call, self.analysis, self.chains):
                return []
            roots.append(root)
            value = self.chains.row(call)[0].inputs[0]
        return roots[::-1]

    def _inputs(self, layers: list[Layer]) -> dict[str, GridSource]:
        found: dict[str, GridSource] = {}
        for layer in layers:
            grids = [self._grid_read(layer, operand, value) for _, operand, value in self._operands_read(layer)]
            if grids and grids[0] is not None and all(grid is grids[0] for grid in grids):
                found[layer.name] = grids[0]
        return found

    def _operands(self, join: Join) -> tuple[GridSource | None, ...]:
        """Return what gives each operand of a join its grid (if unrounded, its layer); None where the calls differ."""
        by_operand: dict[int, list[GridSource | None]] = {}
        for _, operand, value in self._operands_read(join):
            grid = self._grid_read(join, operand, value) or self.makers.get(self._root(value))
            by_operand.setdefault(operand, []).append(grid)
        return tuple(
            grids[0] if all(grid is grids[0] for grid in grids) else None for _, grids in sorted(by_operand.items())
        )

    def _grid_read(self, part: Layer | Join, operand: int, value: ValueIndex) -> GridSource | None:
        """Return what gives a value its grid for a layer or join: a quantizer in that reader, or one before it."""
        own = self.at_readers.get((id(part), operand))
        return self._grid(value) if own is None else own

    def _unary(self) -> dict[ValueIndex, PlannedUnary]:
        found = ((place, find_unary(place, self.analysis, self.chains, self._grid)) for place in self.quantizers)
        return {place.value: operation for place, operation in found if operation is not None}

    def _reads(self, part: Layer | Join) -> list[int]:
        return [value for _, _, value in self._operands_read(part)]

    def _operands_read(self, part: Layer | Join) -> list[tuple[int, int, int]]:
        """Return ``(index of the call, operand, value)`` for each value that a layer or join reads on some grid."""
        calls = [self.analysis.flow.calls[index] for index in part.calls]
        if isinstance(part, Join):
            return [(call.index, *item) for call in calls for item in enumerate(operands(call, self.analysis))]
        if issubclass(part.row[0], (nn.Embedding, nn.EmbeddingBag)):
            return []
        return [(call.index, 0, call.inputs[0]) for call in calls if call.inputs]

    def _grid(self, value: ValueIndex) -> GridSource | None:
        return self.grids.get(self._root(value))

    def _root(self, value: ValueIndex) -> ValueIndex:
        """Return the value from which a value was made by calls that only move values, or ReLUs: the one to quantize.

        A ReLU keeps a grid, but a tensor without one is better quantized after it: half of the codes would be lost.
        """
        if value in self.grids:
            return value
        call = self.analysis.flow.producer(value)
        if call is None or not self.analysis.keeps_grid(call):
            return value
        root = self._root(call.inputs[0])
        return root if root in self.grids or not self.analysis.is_relu(call) else value

    def _qconfig(self, name: str) -> QConfig | None:
        return self.qconfigs[self.analysis.modules[name]]
