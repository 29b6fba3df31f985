"""Weights that are computed from other parameters, as a *program*: calls that can be run outside of any forward.

While a program runs, each tensor is kept under a number, its *slot*. A program (:class:`ComputedParameters`) reads
parameters and buffers into slots (:class:`StateSlot`) and makes its calls one after the other (:class:`Step`). In the
recorded arguments and results of a call a :class:`Slot` stands for each tensor. `prepare_qat` records the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tritonq.nn.reference import Reference


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in recorded arguments and results.

    Attributes:
        index: the number under which the running program keeps the tensor; numbers need not be consecutive.
    """

    index: int


@dataclass
class StateSlot:
    """A parameter or buffer that a program reads.

    Attributes:
        slot: the number under which the program keeps it: the ``index`` of its :class:`Slot`.
        module: a reference to the module that holds it.
        name: its name in that module, such as "weight".
        exclusive: whether it is read for nothing but computed weights, so that a converted model needs no copy of it.
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
        args: positional arguments, with a :class:`Slot` for each tensor.
        kwargs: named arguments, with a :class:`Slot` for each tensor.
        output: the structure of its result (nested tuples and dicts), with a :class:`Slot` for each tensor.
        writes: for each tensor that the call changes in place, the pair (number before, number after) that its slots
            have: after the call the changed tensor is kept under the second number, too.
    """

    call: Callable[..., Any] | Reference[nn.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    writes: tuple[tuple[int, int], ...] = ()


@dataclass
class ComputedParameters:
    """The program that computes weight and bias of a layer from parameters and buffers, by calls recorded in eval mode.

    Calling the object runs it and returns ``(weight, bias)``, differentiable.

    Attributes:
        state: the parameters and buffers that it reads, each with its slot.
        steps: the calls, in order.
        weight: the slot that has the weight at the end.
        bias: the slot that has the bias at the end; None if the layer has none.
    """

    state: Sequence[StateSlot]
    steps: Sequence[Step]
    weight: Slot
    bias: Slot | None = None

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        """Run the program with the present parameters and buffers; return weight and bias (or None).

        Raises:
            ValueError: a module that the program needs was deleted.
        """
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
    """Return recorded arguments with tensors in place of their slots; ``held`` has the tensors by number.

    ``item`` may nest tuples and dicts; other values stay as they are.
    """
    if isinstance(item, Slot):
        return held[item.index]
    if isinstance(item, tuple):
        return tuple(_filled(child, held) for child in item)
    if isinstance(item, dict):
        return {key: _filled(child, held) for key, child in item.items()}
    return item


def _store(output: Any, result: Any, held: dict[int, Any]) -> None:
    """Put the tensors of ``result`` into ``held``, in place, under the numbers that ``output`` gives them.

    ``output`` has the structure of ``result`` (tuples, dicts) with a :class:`Slot` for each tensor; the rest is not
    kept.
    """
    if isinstance(output, Slot):
        held[output.index] = result
    elif isinstance(output, tuple):
        for child, part in zip(output, result, strict=True):
            _store(child, part, held)
    elif isinstance(output, dict):
        for key, child in output.items():
            _store(child, result[key], held)
