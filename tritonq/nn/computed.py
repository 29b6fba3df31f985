"""Weights that are computed of other parameters, as a program that can be run outside of any forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tritonq.nn.reference import Reference


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor in a program: the place where it is kept while the program runs."""

    index: int


@dataclass
class StateSlot:
    """A parameter or buffer that a program reads.

    Attributes:
        slot: where the program keeps it.
        module: the module that holds it.
        name: its name there.
        exclusive: whether nothing but computed weights reads it, so that a converted model can go without it.
    """

    slot: int
    module: Reference[nn.Module]
    name: str
    exclusive: bool


@dataclass
class Step:
    """One call of a program.

    Attributes:
        call: the function, or a reference to the module.
        args: positional arguments, tensors as :class:`Slot`.
        kwargs: named arguments, tensors as :class:`Slot`.
        output: the structure of its result, tensors as :class:`Slot`.
        writes: slots of tensors that it overwrites, each with that of the result.
    """

    call: Callable[..., Any] | Reference[nn.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    writes: tuple[tuple[int, int], ...] = ()


@dataclass
class ComputedParameters:
    """Weight and bias of a layer, as they follow from parameters and buffers in eval mode.

    Attributes:
        state: the parameters and buffers.
        steps: the calls, in order.
        weight: the slot of the weight.
        bias: the slot of the bias; None without one.
    """

    state: Sequence[StateSlot]
    steps: Sequence[Step]
    weight: Slot
    bias: Slot | None = None

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        """Run the program on what the parameters and buffers hold now."""
        held: dict[int, Any] = {}
        for entry in self.state:
            if entry.module.module is None:
                raise ValueError(f"the module that holds {entry.name!r}, of which a weight is computed, is gone")
            held[entry.slot] = getattr(entry.module.module, entry.name)
        for step in self.steps:
            call = step.call.module if isinstance(step.call, Reference) else step.call
            if call is None:
                raise ValueError("a module that computes a weight is gone")
            result = call(*_filled(tuple(step.args), held), **_filled(dict(step.kwargs), held))
            _store(step.output, result, held)
            held.update({after: held[before] for before, after in step.writes})
        return held[self.weight.index], None if self.bias is None else held[self.bias.index]


def _filled(item: Any, held: Mapping[int, Any]) -> Any:
    if isinstance(item, Slot):
        return held[item.index]
    if isinstance(item, tuple):
        return tuple(_filled(child, held) for child in item)
    if isinstance(item, dict):
        return {key: _filled(child, held) for key, child in item.items()}
    return item


def _store(output: Any, result: Any, held: dict[int, Any]) -> None:
    if isinstance(output, Slot):
        held[output.index] = result
    elif isinstance(output, tuple):
        for child, part in zip(output, result, strict=True):
            _store(child, part, held)
    elif isinstance(output, dict):
        for key, child in output.items():
            _store(child, result[key], held)
