"""Decide which tensors of a network share a fixed-point format, from the record.

Tensors that the same values flow through (ReLU, max pooling, flattening, concatenation) form one *group*. A group that
a layer or a pooling reads has a format of its own. A group that only one addition reads is computed in units of the
sum's format. The inputs of an addition or an average share the parameter ``|α| / levels`` of its output's format, so
that their units differ by a power of two. Values that are read in a format are divided by its factor η.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize
from tritonq.nn import intrinsic
from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.average_pool import averaging_of_call
from tritonq.prepare.decide.chains import Chains
from tritonq.prepare.decide.layers import Layer, find_layer_in_eval
from tritonq.prepare.record.dataflow import Call, CallIndex, Ref, ValueIndex
from tritonq.qconfig import QConfig
from tritonq.reference.average_pool import AdaptiveAverage, AxesAverage, WindowAverage

_LAYER_TYPES = (nn.Conv2d, nn.Linear)
_SWAPPED = frozenset({intrinsic.ConvBn2d})
# torch has these for floats alone.
_ONLY_FLOATS = ("adaptivemaxpool", "reflectionpad", "replicationpad", "circularpad", "upsample", "interpolate")
_CLIPPED_RELUS = ("relu6", "hardtanh")


def is_fixed_point(qconfig: QConfig | None) -> bool:
    """Whether a qconfig makes fixed-point quantizers (``FixedPointFakeQuantize``) for activations; False for None."""
    return qconfig is not None and isinstance(qconfig.activation(), FixedPointFakeQuantize)


@dataclass(frozen=True)
class Pooling:
    """An average pooling.

    Attributes:
        call: its recorded call.
        kernel_size: height and width of the window; None: the whole image.
        stride: steps of the window, (height, width); None: those of the kernel size.
        padding: (height, width).
        area: number of values per window.
        keepdim: whether the result keeps its two image dimensions.
    """

    call: Call
    kernel_size: tuple[int, int] | None
    stride: tuple[int, int] | None
    padding: tuple[int, int]
    area: int
    keepdim: bool


@dataclass
class Group:
    """Tensors that have one format.

    Attributes:
        values: indices of the tensors' values.
        readers: ``(call, place among its operands)`` of layers, sums and averages (not max poolings) that read one.
        rectified: whether all these readers, in call order, are behind a ReLU: codes are unsigned; False without any.
        scaled: whether their values are divided by a factor η; False for the network's input, whose values are real.
        has_format: whether they are rounded to a format of their own. False if nothing reads them, or if one addition
            alone reads what one layer, addition or pooling made, without a ReLU between the two.
    """

    values: set[ValueIndex] = field(default_factory=set)
    readers: list[tuple[Call, int]] = field(default_factory=list)
    rectified: bool = False
    scaled: bool = True
    has_format: bool = False

    @property
    def returned(self) -> bool:
        """Whether no layer, addition or pooling reads the tensors, so that they hold real values."""
        return not self.readers


@dataclass
class Links:
    """A network's layers, additions and poolings, and the groups of tensors between them.

    Attributes:
        analysis: the model and its record.
        layers: each layer, by index of the call that it begins with (the convolution's, before its BatchNorm).
        ends: index of the result of each layer (with its BatchNorm), addition or pooling, by index of its (first) call.
        additions: each addition, as its call, by index of that call.
        poolings: each average pooling, by index of its call.
        groups: the group that each value belongs to, by index of the value; values of one group share one object.
        relus: calls of clipped ReLUs (ReLU6), which become plain ReLUs: the format's learned level clips instead.
    """

    analysis: Analysis
    layers: dict[CallIndex, Layer] = field(default_factory=dict)
    ends: dict[CallIndex, ValueIndex] = field(default_factory=dict)
    additions: dict[CallIndex, Call] = field(default_factory=dict)
    poolings: dict[CallIndex, Pooling] = field(default_factory=dict)
    groups: dict[ValueIndex, Group] = field(default_factory=dict)
    relus: list[Call] = field(default_factory=list)

    def units(self, group: Group) -> Group | None:
        """Return the group whose format has the factor η by which the values of ``group`` are divided.

        That is ``group`` itself if it has a format, else the group of the sum that reads it, and so on. None: the
        network returns the values, which are real.
        """
        while not group.has_format:
            if group.returned:
                return None
            group = self.groups[self.ends[group.readers[0][0].index]]
        return group


def find_links(analysis: Analysis, all_runs: Analysis) -> Links:
    """Return the links of ``analysis``, the eval run; ``all_runs``, with every run, says which BatchNorm is a layer's.

    Raises:
        ValueError: no layer; a layer, or an operation between layers, that has no fixed-point form or runs more than
            once; a BatchNorm that can't be part of its layer; a sum with what comes from no layer; an output whose
            following layer can't be found, that something else reads, too, or that is read before and after a ReLU6.
    """
    return _Finder(analysis, all_runs).find()


class _Finder:
    def __init__(self, analysis: Analysis, all_runs: Analysis) -> None:
        self.analysis, self.all_runs, self.flow = analysis, all_runs, analysis.flow
        self.links = Links(analysis)
        self.absorbed: dict[CallIndex, CallIndex] = {}

    def find(self) -> Links:
        self._find_layers()
        # Values that some layer contributed to, and values that some layer reads, however far away.
        self.after = self._spread(self.links.ends.values(), downwards=True)
        starts = (self.flow.calls[index].inputs[0] for index in self.links.layers)
        self.before = self._spread(starts, downwards=False)
        for call in self.flow.calls:
            self._visit(call)
        for group in self._groups():
            self._settle(group)
        self._check_units()
        return self.links

    def output_of(self, value: ValueIndex) -> str:
        """Return text for errors: "the output of layer 'a'", "… of layers 'a' and 'b'", or "the network's input".

        The layers are the nearest before ``value``, the index of a recorded tensor; without any it is the input.
        """
        names: list[str] = []
        pending, seen = [value], set()
        while pending:
            current = pending.pop()
            call = self.flow.producer(current)
            if call is None or current in seen:
                continue
            seen.add(current)
            index = self.absorbed.get(call.index, call.index)
            if index in self.links.layers:
                names.append(self.links.layers[index].name)
            else:
                pending += call.inputs
        found = [repr(name) for name in dict.fromkeys(reversed(names))]
        layers = f"layer{'s' if len(found) > 1 else ''} {' and '.join(found)}"
        return f"the output of {layers}" if found else "the network's input"

    def _find_layers(self) -> None:
        for name, module in self.analysis.modules.items():
            if not isinstance(module, _LAYER_TYPES) or not self.flow.calls_of(name):
                continue
            if type(module) not in _LAYER_TYPES:
                raise ValueError(f"the layer {name!r} is a {type(module).__name__}, which has no fixed-point form")
            layer, obstacle = find_layer_in_eval(name, type(module), self.all_runs, _SWAPPED, len(self.flow.calls))
            if layer.batch_norm is not None and self.analysis.modules[layer.batch_norm].weight is None:
                obstacle = "it has affine=False"
            if obstacle is not None or layer.remainder:
                raise ValueError(f"the BatchNorm after layer {name!r} can't become part of it: {obstacle}")
            if len(layer.calls) != 1:
                raise ValueError(f"the layer {name!r} is called {len(layer.calls)} times: its format is ambiguous")
            start, end = layer.calls[0], layer.ends[0]
            result = self.analysis.value_of(self.flow.calls[end])
            if result is None or not self.flow.calls[start].inputs:
                raise ValueError(f"the layer {name!r} doesn't take and return one tensor")
            self.links.layers[start] = layer
            self.links.ends[start] = result
            self._absorb(start, end)
        if not self.links.layers:
            raise ValueError(f"{type(self.analysis.model).__name__} has no Conv2d and no Linear layer that is called")

    def _absorb(self, start: int, end: int) -> None:
        """Note that every call from the convolution (``start``) up to its BatchNorm (``end``) is part of the layer."""
        call = self.flow.calls[end]
        while call.index != start:
            self.absorbed[call.index] = start
            # A BatchNorm that was found by dataflow has a producer.
            call = cast(Call, self.flow.producer(call.inputs[0]))

    def _spread(self, values: Iterable[ValueIndex], downwards: bool) -> set[ValueIndex]:
        pending, seen = list(values), set()
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            if downwards:
                pending += [out for call in self.flow.consumers(value) for out in call.outputs]
            else:
                call = self.flow.producer(value)
                pending += [] if call is None else call.inputs
        return {value for value in seen if not self.flow.is_state(value)}

    def _visit(self, call: Call) -> None:
        """Add a call to :class:`Links`: as an addition or pooling, or by merging the groups of what it passes on.

        Raises:
            ValueError: between two layers stands something without a fixed-point form, or without a single tensor as
                result.
        """
        if call.index in self.absorbed:
            return
        if call.index in self.links.layers:
            self._read(call, 0, call.inputs[0])
            return
        inputs = [value for value in call.inputs if value in self.after]
        result = self.analysis.value_of(call)
        if not inputs or not any(out in self.before for out in call.outputs):
            return  # before the first layers, or after the last ones: it stays in float
        where = self.output_of(inputs[0])
        if result is None:
            raise ValueError(f"the layer that follows can't be found: {where} goes through {call.name}")
        self._check_called_once(call)
        if call.name == "cat":
            for value in call.inputs:
                self._merge(value, result)
        elif self._is_addition(call):
            self.links.additions[call.index] = call
            self.links.ends[call.index] = result
            for operand, value in enumerate(_operands(call)):
                self._read(call, operand, value)
        elif (pooling := self._pooling(call)) is not None:
            self.links.poolings[call.index] = pooling
            self.links.ends[call.index] = result
            self._read(call, 0, inputs[0])
        elif self._is_relu(call) or self._passes_codes(call):
            self._merge(inputs[0], result)
        else:
            raise ValueError(
                f"the layer that follows can't be found: {where} goes through {call.name}, which has no fixed-point "
                "form"
            )

    def _passes_codes(self, call: Call) -> bool:
        """Whether a call passes values on unchanged, and works on integers as well as on floats."""
        kind = type(call.target).__name__ if call.kind == "module" else call.name
        only_floats = kind.lower().replace("_", "").startswith(_ONLY_FLOATS)
        if call.kind == "function" and call.name == "pad":
            only_floats = call.kwargs.get("mode", call.args[2] if len(call.args) > 2 else "constant") != "constant"
        return self.analysis.keeps_grid(call) and not only_floats

    def _check_called_once(self, call: Call) -> None:
        if len(self.analysis.calls_like(call)) > 1 and not self.analysis.keeps_grid(call) and not self._is_relu(call):
            place = call.module_name or call.owner or "the model"
            made = self.output_of(call.inputs[0])
            raise ValueError(f"{call.name} in {place!r} runs more than once: the format of {made} is ambiguous")

    def _is_addition(self, call: Call) -> bool:
        operands = _operands(call)
        if call.kind != "function" or call.name != "add" or len(operands) != 2 or call.kwargs.get("alpha", 1) != 1:
            return False
        known = [value for value in operands if value in self.after]
        if len(known) < 2:
            raise ValueError(
                f"the sum in {call.owner or 'the model'!r} adds something that comes from no layer to "
                f"{self.output_of(known[0])}; its scaling factor is unknown"
            )
        first, second = (self.flow.values[value].shape for value in operands)
        return first == second

    def _is_relu(self, call: Call) -> bool:
        clipped = type(call.target) is nn.ReLU6 or (call.kind == "function" and call.name in _CLIPPED_RELUS)
        if clipped and not any(call is known for known in self.links.relus):
            self.links.relus.append(call)
        return clipped or self.analysis.is_relu(call)

    def _pooling(self, call: Call) -> Pooling | None:
        """Return the pooling of a call that is a mean over windows of an image; None if their sizes may differ."""
        shape, result = (self.flow.values[value].shape for value in (call.inputs[0], call.outputs[0]))
        mean = averaging_of_call(call, shape, has_fixed_arguments=False)
        if isinstance(mean, WindowAverage) and len(mean.kernel_size) == 2:
            differ = mean.ceil_mode or mean.divisor_override or (any(mean.padding) and not mean.count_include_pad)
            if differ or not Chains(self.analysis, (), ()).has_fixed_number(call):
                return None
            size, stride, padding = cast("tuple[tuple[int, int], ...]", (mean.kernel_size, mean.stride, mean.padding))
            return Pooling(call, size, stride, padding, math.prod(size), True)
        if isinstance(mean, AdaptiveAverage) and len(mean.output_size) == 2 and len(shape) == 4:
            if shape[2] % result[2] or shape[3] % result[3]:
                return None
            size = (shape[2] // result[2], shape[3] // result[3])
            return Pooling(call, None if result[2:] == (1, 1) else size, None, (0, 0), math.prod(size), True)
        if isinstance(mean, AxesAverage) and len(shape) == 4 and {axis % 4 for axis in mean.axes or ()} == {2, 3}:
            return Pooling(call, None, None, (0, 0), shape[2] * shape[3], mean.keepdim)
        return None

    def _read(self, call: Call, operand: int, value: ValueIndex) -> None:
        group = self._group(value)
        group.readers.append((call, operand))
        group.scaled = group.scaled and value in self.after

    def _group(self, value: ValueIndex) -> Group:
        return self.links.groups.setdefault(value, Group({value}))

    def _merge(self, value: ValueIndex, other: ValueIndex) -> None:
        first, second = self._group(value), self._group(other)
        if first is not second:
            first.values |= second.values
            first.readers += second.readers
            first.scaled = first.scaled and second.scaled
            for member in second.values:
                self.links.groups[member] = first

    def _groups(self) -> list[Group]:
        for value in self.links.ends.values():
            self._group(value)
        return list({id(group): group for group in self.links.groups.values()}.values())

    def _settle(self, group: Group) -> None:
        """Set ``rectified`` and ``has_format`` of a group whose readers are all known.

        Raises:
            ValueError: the group has no single format: something besides the following layer reads it, or it is read
                both before and after a ReLU6.
        """
        group.readers.sort(key=lambda reader: reader[0].index)
        rectified = [self._is_rectified(_operands(call)[operand]) for call, operand in group.readers]
        group.rectified = bool(rectified) and all(rectified)
        additions = [call for call, _ in group.readers if call.index in self.links.additions]
        makers = [value for value in self.links.ends.values() if value in group.values]
        only_added = len(additions) == len(group.readers) <= 1 and len(makers) <= 1
        group.has_format = not only_added or group.rectified
        others = self._other_readers(group)
        if others and not group.returned:
            made = self.output_of(min(group.values))
            raise ValueError(f"{made} is read by {others[0]} besides its following layer; that has no fixed-point form")
        clips = [call.name for call in self.links.relus if call.inputs[0] in group.values]
        if clips and any(rectified) and not group.rectified:
            made = self.output_of(min(group.values))
            raise ValueError(f"{made} is read both before and after {clips[0]}, whose clipping no format can take over")

    def _other_readers(self, group: Group) -> list[str]:
        """Return names of what reads a group's values besides its readers, such as "relu" or "the model's caller"."""
        known = {call.index for call, _ in group.readers}
        found = []
        for value in sorted(group.values):
            if self.flow.values[value].is_output and group.scaled:
                found.append("the model's caller")
            for call in self.flow.consumers(value):
                inside = self.analysis.value_of(call) in group.values
                if call.index not in known and not inside and group.scaled and call.outputs:
                    found.append(call.name)
        return found

    def _is_rectified(self, value: ValueIndex) -> bool:
        call = self.flow.producer(value)
        if call is None or value not in self.after:
            return False
        if call.index in self.links.poolings:
            return self._is_rectified(call.inputs[0])
        if value in self.links.ends.values():
            return False
        if call.name == "cat":
            return all(self._is_rectified(part) for part in call.inputs)
        return self._is_relu(call) or self._is_rectified(call.inputs[0])

    def _check_units(self) -> None:
        """Raise ValueError unless a layer follows each addition and pooling.

        Only layers can take a pooling's factor.
        """
        for call in (*self.links.additions.values(), *(pooling.call for pooling in self.links.poolings.values())):
            group = self.links.groups[self.links.ends[call.index]]
            if self.links.units(group) is None:
                raise ValueError(
                    f"the layer that follows {call.name} on {self.output_of(call.inputs[0])} can't be found: the "
                    "network returns it"
                )


def _operands(call: Call) -> tuple[int, ...]:
    """Return the values that a call takes as arguments of their own, in order, repetitions included.

    If there are none, as for ``cat``, return all values that it reads.
    """
    given = (*call.args, *call.kwargs.values())
    return tuple(item.value for item in given if isinstance(item, Ref)) or call.inputs
