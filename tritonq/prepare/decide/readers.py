"""Plan quantizers that stand where a tensor is read: inside of the layers and joins that read it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tritonq.prepare.decide.joins import Join
from tritonq.prepare.decide.layers import Layer
from tritonq.prepare.record.dataflow import CallIndex, ValueIndex
from tritonq.qconfig import QConfig


@dataclass(frozen=True)
class Reading:
    """One call of a layer or join that reads a tensor.

    Attributes:
        part: the layer or join.
        operand: position of the tensor among those that it reads, from 0.
        value: index of the recorded value.
        call: index of the call.
        qconfig: the qconfig whose activation quantizer the tensor gets.
    """

    part: Layer | Join
    operand: int
    value: ValueIndex
    call: CallIndex
    qconfig: QConfig

    @property
    def home(self) -> str:
        """Name of the module whose qconfig and device the reader has.

        That is a layer's own module, or for a function or a join the module whose forward calls it, "" for the model.
        """
        return self.part.home


@dataclass(frozen=True)
class Reader:
    """A layer or join that quantizes what it reads.

    Attributes:
        part: the layer or join.
        operand: position of the tensor among those that it reads, from 0.
        observes: whether it observes the tensor in training; if several read one tensor, only the first does.
    """

    part: Layer | Join
    operand: int
    observes: bool

    @property
    def name(self) -> str:
        """Name of the layer, or the join in words: "add in the forward of block"."""
        if isinstance(self.part, Layer):
            return self.part.name
        return f"{self.part.kind} in the forward of {self.part.owner or 'the model'}"


@dataclass(frozen=True)
class SharedReading:
    """Readers that share one quantizer, because they read the same tensors.

    Attributes:
        value: index of the value that the first reading, in order of execution, reads.
        qconfig: that of the first reading.
        readers: the readers, in order of execution.
    """

    value: ValueIndex
    qconfig: QConfig
    readers: tuple[Reader, ...]


def share_readings(readings: Iterable[Reading]) -> list[SharedReading]:
    """Return readings in groups, so that each operand of each reader has one quantizer, and so has each tensor.

    Readings of one value, or of one operand of one layer or join, come into one group, also along chains of these.
    """
    groups: dict[object, list[Reading]] = {}
    for reading in sorted(readings, key=lambda reading: reading.call):
        keys = (("value", reading.value), ("operand", id(reading.part), reading.operand))
        found = [groups[key] for key in keys if key in groups]
        merged = found[0] if found else []
        for other in found[1:]:
            if other is not merged:
                merged.extend(other)
                groups.update({key: merged for key, group in groups.items() if group is other})
        merged.append(reading)
        groups.update(dict.fromkeys(keys, merged))
    unique = {id(group): group for group in groups.values()}
    return [_shared(sorted(group, key=lambda reading: reading.call)) for group in unique.values()]


def _shared(readings: list[Reading]) -> SharedReading:
    """Return the readers of one group of readings; the first reader of each tensor observes it."""
    values: dict[tuple[int, int], set[ValueIndex]] = {}
    parts = {id(reading.part): reading.part for reading in readings}
    for reading in readings:
        values.setdefault((id(reading.part), reading.operand), set()).add(reading.value)
    seen: set[ValueIndex] = set()
    readers = []
    for (part, operand), read in values.items():
        readers.append(Reader(parts[part], operand, observes=not read <= seen))
        seen |= read
    return SharedReading(readings[0].value, readings[0].qconfig, tuple(readers))
