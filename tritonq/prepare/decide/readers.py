"""Quantizers that stand where a tensor is read: in the layers and joins that read it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tritonq.prepare.decide.joins import Join
from tritonq.prepare.decide.layers import Layer
from tritonq.qconfig import QConfig


@dataclass(frozen=True)
class Reading:
    """One call of a layer or join that reads a tensor.

    Attributes:
        part: the layer or join.
        operand: which of the tensors that it reads.
        value: the recorded value.
        call: index of the call.
        qconfig: whose activation quantizer the tensor gets.
    """

    part: Layer | Join
    operand: int
    value: int
    call: int
    qconfig: QConfig

    @property
    def home(self) -> str:
        """Name of the module whose qconfig and device the reader has."""
        return self.part.home


@dataclass(frozen=True)
class Reader:
    """A layer or join that quantizes what it reads.

    Attributes:
        part: the layer or join.
        operand: which of the tensors that it reads.
        observes: whether it observes them; where several read one tensor, the first alone does.
    """

    part: Layer | Join
    operand: int
    observes: bool

    @property
    def name(self) -> str:
        """The layer's name, or the join in words."""
        if isinstance(self.part, Layer):
            return self.part.name
        return f"{self.part.kind} in the forward of {self.part.owner or 'the model'}"


@dataclass(frozen=True)
class SharedReading:
    """Readers that share one quantizer, since some of them read the same tensors.

    Attributes:
        value: the first of these.
        qconfig: that of the first reader.
        readers: in order of execution.
    """

    value: int
    qconfig: QConfig
    readers: tuple[Reader, ...]


def share_readings(readings: Iterable[Reading]) -> list[SharedReading]:
    """Group readings so that each operand of each reader, and each tensor, has one quantizer."""
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
    values: dict[tuple[int, int], set[int]] = {}
    parts = {id(reading.part): reading.part for reading in readings}
    for reading in readings:
        values.setdefault((id(reading.part), reading.operand), set()).add(reading.value)
    seen: set[int] = set()
    readers = []
    for (part, operand), read in values.items():
        readers.append(Reader(parts[part], operand, observes=not read <= seen))
        seen |= read
    return SharedReading(readings[0].value, readings[0].qconfig, tuple(readers))
