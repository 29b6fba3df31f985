"""What follows from parameters and buffers alone: values that are the same for every input of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import nn

from tritonq.prepare.record.dataflow import Call, Dataflow, refs_in

_RANDOM_NAMES = """
    rand randn randint randperm rand_like randn_like randint_like bernoulli normal multinomial poisson uniform random
    exponential dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout empty
    empty_like new_empty
"""
# Functions whose result differs between calls.
_RANDOM = frozenset(_RANDOM_NAMES.split())
_RANDOM_MODULES = (nn.modules.dropout._DropoutNd,)


@dataclass(frozen=True)
class PlannedProgram:
    """The calls that compute constants.

    Attributes:
        state: the parameters and buffers that they read, value and qualified name.
        calls: the calls, in order.
        results: the values that they compute.
    """

    state: Mapping[int, str]
    calls: tuple[Call, ...]
    results: tuple[int, ...]

    def only(self, result: int) -> PlannedProgram:
        """Return the program for one of the results."""
        return replace(self, results=(result,))


class Constants:
    """The constants of a recorded model.

    Args:
        model: the model.
        flow: the record of its runs.
    """

    def __init__(self, model: nn.Module, flow: Dataflow) -> None:
        self._model, self._flow = model, flow

    @cached_property
    def values(self) -> frozenset[int]:
        """The values that are parameters, buffers, or computed of nothing else."""
        found = {value.index for value in self._flow.values if value.source == "state"}
        for call in self._flow.calls:
            written = {after for _, after in call.writes}
            if _is_random(call) or not found.issuperset(call.inputs):
                found -= written
            else:
                found.update(call.outputs)
        return frozenset(found)

    def is_parameter(self, value: int) -> bool:
        """Whether a value is a parameter of the model."""
        record = self._flow.values[value]
        return record.source == "state" and str(record.path[0]) in self._parameters

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(name for name, _ in self._model.named_parameters(remove_duplicate=False))

    def program(self, results: Iterable[int]) -> PlannedProgram | None:
        """Return the calls that compute some constants; None where one was not made by a call or is written to."""
        results = tuple(results)
        calls: dict[int, Call] = {}
        state: dict[int, str] = {}
        for value in self._before(results):
            record, call = self._flow.values[value], self._flow.producer(value)
            if record.source == "state":
                state[value] = str(record.path[0])
            elif call is None or any(self._flow.is_state(before) for before, _ in call.writes):
                return None
            else:
                calls[call.index] = call
        return PlannedProgram(state, tuple(calls[index] for index in sorted(calls)), results)

    def state_names(self, results: Iterable[int]) -> frozenset[str]:
        """Return names of the parameters and buffers that some values follow from."""
        values = (self._flow.values[value] for value in self._before(results))
        return frozenset(str(value.path[0]) for value in values if value.source == "state")

    def rests_on(self, results: Iterable[int]) -> Literal["unknown", "input", "random"]:
        """Return the source of values that are no constants: foreign tensors, the model's inputs, or random numbers."""
        sources = {self._flow.values[value].source for value in self._before(results)}
        return "unknown" if "unknown" in sources else "input" if "input" in sources else "random"

    def _before(self, results: Iterable[int]) -> set[int]:
        """Return values, and those that they were computed of."""
        pending, seen = list(results), set[int]()
        while pending:
            value = pending.pop()
            call = self._flow.producer(value)
            if value not in seen and call is not None:
                pending += (*call.inputs, *refs_in((*call.args, *call.kwargs.values())))
            seen.add(value)
        return seen

    def exclusive(self, weights: Iterable[tuple[int, int]]) -> frozenset[str]:
        """Return names of parameters and buffers that nothing reads but the computation of weights.

        ``weights`` holds each weight and bias of a layer with the index of the layer's call.
        """
        ends = set(weights)
        useful: set[int] = set()  # constants that are read by something else, directly or not
        for value in sorted(self.values, reverse=True):
            record = self._flow.values[value]
            readers = (self._flow.calls[index] for index in record.consumers)
            if record.is_output or any(self._is_other_use(value, reader, ends, useful) for reader in readers):
                useful.add(value)
        read = {str(self._flow.values[value].path[0]) for value in useful if self._flow.is_state(value)}
        state = {str(value.path[0]) for value in self._flow.values if value.source == "state"}
        return frozenset(state - read - self._read_by_leaves)

    def _is_other_use(self, value: int, reader: Call, ends: set[tuple[int, int]], useful: set[int]) -> bool:
        if (value, reader.index) in ends:
            return False
        return not self.values.issuperset(reader.outputs) or not useful.isdisjoint(reader.outputs)

    @cached_property
    def _read_by_leaves(self) -> frozenset[str]:
        """Names of tensors that modules hold whose calls are recorded as a whole, under any of their names."""
        names = {id(tensor): name for name, tensor in _tensors(self._model)}
        leaves = {call.target for call in self._flow.calls if isinstance(call.target, nn.Module)}
        return frozenset(names[id(tensor)] for leaf in leaves for _, tensor in _tensors(leaf))


def _tensors(module: nn.Module) -> list[tuple[str, object]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _is_random(call: Call) -> bool:
    return call.name in _RANDOM or isinstance(call.target, _RANDOM_MODULES)
