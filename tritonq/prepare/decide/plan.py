"""The plan: everything that `prepare_qat` will do to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tritonq.prepare.decide.joins import Join
from tritonq.prepare.decide.layers import Layer
from tritonq.prepare.decide.readers import Reader
from tritonq.prepare.decide.unary import PlannedUnary
from tritonq.prepare.record.dataflow import Call, CallIndex, ValueIndex
from tritonq.prepare.record.structure import Path
from tritonq.qconfig import QConfig

Where = Literal["output", "node", "consumer"]


@dataclass(frozen=True)
class PlannedQuantizer:
    """A quantizer for a tensor that no quantized layer or join returns.

    Attributes:
        where: where it stands. ``"output"``: it quantizes what the module ``owner`` returns; ``"node"``: the result of
            a node in the forward of ``owner``; ``"consumer"``: what the layers and joins ``consumers`` read, such as an
            input of the model.
        owner: name of the module that ``where`` speaks of, "" for the model itself; for ``"consumer"`` always "".
        value: index of one recorded value that it quantizes.
        node: name of the node, for ``"node"``, or ``Call.place`` of its call in a forward without a graph; else "".
        label: what the quantizer of a node is named after, for ``"node"``; else "".
        in_place: whether that node overwrites its first operand; False where there is no node.
        qconfig: the qconfig whose activation factory makes it.
        like: name of the module on whose device the quantizer lives, such as a layer that reads the tensor, or the
            module whose forward calls the join or function that reads it.
        consumers: the layers and joins that read the tensor, for ``"consumer"``.
        input_path: for an input of the model, the keys that lead to it in the model's arguments, such as ``(0,)`` or
            ``("x", "mask")``; else empty.
    """

    where: Where
    owner: str
    value: ValueIndex
    node: str
    label: str
    in_place: bool
    qconfig: QConfig
    like: str
    consumers: tuple[Reader, ...] = ()
    input_path: Path = ()


# What gives a tensor its grid.
GridSource: TypeAlias = Layer | Join | PlannedQuantizer


@dataclass(frozen=True)
class Plan:
    """Everything that will be done to a model. Calls and values are given by index, layers and modules by name.

    What gives a tensor its grid is a :class:`Layer` or :class:`Join` with its output quantizer, or a
    :class:`PlannedQuantizer`.

    Attributes:
        layers: modules and functions to make quantized layers of.
        clipped: names of layers whose output quantizer stands behind the ReLU6 or the like that alone reads them.
        outputs: for a layer in ``clipped``, by name, the quantizer behind its clip; the layer has no entry if its calls
            have different ones.
        joins: additions, concatenations and the like to make modules of.
        quantizers: further activation quantizers.
        inputs: for each layer what gives its input a grid; it has no entry if several things do, or none.
        operands: for each join what gives each of its operands a grid; None for an operand if several do, or none.
        unary: operations of one tensor that can be computed on codes, by the index of the value that their quantizer
            rounds.
        erased: ReLU calls that became part of a layer or join, and clips that became part of a clip behind them.
        erased_modules: names of ReLU and clip modules all of whose calls did.
        erased_nodes: ``(owner, node)`` of the other such calls that can be removed from a forward.
        float_reasons: for each module and function left in float, the reason.
        single_mode: names of modules left in float because they run in eval mode only, or in training mode only.
        exclusive_state: names of parameters and buffers that are read for nothing but weights of layers computed from
            them.
        float_functions: for each function with weights left in float, by name, its first call.
        float_joins: joins left in float, each with the reason.
        summands: names of layers that do not round their results, since a join that reads these rounds, or an island
            reads them unrounded.
        unread: names of layers whose results nothing reads, so that they need no quantizer.
        float_results: joins whose results softmax or a norm reads unrounded.
        on_grid: indices of the values that lie on grids.
        read: indices of the values that layers and joins read.
    """

    layers: tuple[Layer, ...]
    clipped: frozenset[str]
    outputs: Mapping[str, GridSource]
    joins: tuple[Join, ...]
    quantizers: tuple[PlannedQuantizer, ...]
    inputs: Mapping[str, GridSource]
    operands: Mapping[Join, tuple[GridSource | None, ...]]
    unary: Mapping[ValueIndex, PlannedUnary]
    erased: frozenset[CallIndex]
    erased_modules: tuple[str, ...]
    erased_nodes: tuple[tuple[str, str], ...]
    float_reasons: Mapping[str, str]
    single_mode: frozenset[str] = frozenset()
    exclusive_state: frozenset[str] = frozenset()
    float_functions: Mapping[str, Call] = field(default_factory=dict)
    float_joins: tuple[tuple[Join, str], ...] = ()
    summands: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    float_results: tuple[Join, ...] = ()
    on_grid: frozenset[ValueIndex] = frozenset()
    read: frozenset[ValueIndex] = frozenset()

    def __str__(self) -> str:
        """Return one line per layer, join, quantizer, erased ReLU and module left in float."""
        lines = []
        for layer in self.layers:
            types = ", ".join(kind.__name__ for kind in layer.row)
            behind = "; rounded with the join that it enters" if layer.name in self.summands else ""
            lines.append(f"layer {layer.name}: {types}; {self._reads(self.inputs.get(layer.name))}{behind}")
        for join in self.joins:
            grids = " and of ".join(self._source(grid) for grid in self.operands.get(join, ()))
            relu = "" if join.ceiling is None else " and the ReLU behind it"
            lines.append(f"join {self._source(join)}{relu}" + (f"; reads the grids of {grids}" if grids else ""))
        for quantizer in self.quantizers:
            on_codes = ", of an operation on codes" if quantizer.value in self.unary else ""
            lines.append(f"add {self._source(quantizer)}{on_codes}")
        lines += [f"erase the ReLU {name}" for name in self.erased_modules]
        lines += [f"erase {node} in the forward of {owner or 'the model'}" for owner, node in self.erased_nodes]
        lines += [f"leave {name} in float: {reason}" for name, reason in self.float_reasons.items()]
        lines += [f"leave {self._source(join)} in float: {reason}" for join, reason in self.float_joins]
        return "\n".join(lines)

    def _reads(self, grid: GridSource | None) -> str:
        return "no one grid is known for its input" if grid is None else f"reads the grid of {self._source(grid)}"

    def _source(self, grid: GridSource | None) -> str:
        if grid is None:
            return "nothing known"
        if isinstance(grid, Layer):
            return f"layer {grid.name}"
        if isinstance(grid, Join):
            return f"{grid.kind} in the forward of {grid.owner or 'the model'}"
        consumers = " and ".join(dict.fromkeys(reader.name for reader in grid.consumers))
        places = {
            "output": f"the quantizer of what {grid.owner} returns",
            "node": f"the quantizer of {grid.label} in the forward of {grid.owner or 'the model'}",
            "consumer": f"the quantizer of v{grid.value} in its readers: {consumers}",
        }
        return places[grid.where]
