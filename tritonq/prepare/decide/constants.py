"""Find the constants of a recorded model: values that are computed from parameters and buffers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import nn

from tritonq.prepare.record.dataflow import Call, CallIndex, Dataflow, ValueIndex, refs_in

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
    """The calls that compute some constants from parameters and buffers.

    Attributes:
        state: qualified name of each parameter and buffer that the constants need, by index of its value.
        calls: the calls, in order of execution.
        results: indices of the constants; one may be a parameter or buffer itself, which no call computes.
    """

    state: Mapping[ValueIndex, str]
    calls: tuple[Call, ...]
    results: tuple[ValueIndex, ...]

    def only(self, result: ValueIndex) -> PlannedProgram:
        """Return a program with the same calls and ``result``, one of ``results``, as its only result."""
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
    def values(self) -> frozenset[ValueIndex]:
        """Indices of the values that are parameters or buffers, or computed without other tensors or random numbers."""
        found = {value.index for value in self._flow.values if value.source == "state"}
        for call in self._flow.calls:
            written = {after for _, after in call.writes}
            if _is_random(call) or not found.issuperset(call.inputs):
                found -= written
            else:
                found.update(call.outputs)
        return frozenset(found)

    def is_parameter(self, value: ValueIndex) -> bool:
        """Whether the value with this index is a parameter of the model itself, not a buffer nor computed."""
        record = self._flow.values[value]
        return record.source == "state" and str(record.path[0]) in self._parameters

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(name for name, _ in self._model.named_parameters(remove_duplicate=False))

    def program(self, results: Iterable[ValueIndex]) -> PlannedProgram | None:
        """Return the program that computes constants from parameters and buffers.

        None if one of them, or a value that one is computed from, is neither a parameter or buffer nor the result of a
        recorded call, or if one of the calls changes a parameter or buffer in place.

        Args:
            results: the constants, by index in ``Dataflow.values``.
        """
        results = tuple(results)
        calls: dict[CallIndex, Call] = {}
        state: dict[ValueIndex, str] = {}
        for value in self._before(results):
            record, call = self._flow.values[value], self._flow.producer(value)
            if record.source == "state":
                state[value] = str(record.path[0])
            elif call is None or any(self._flow.is_state(before) for before, _ in call.writes):
                return None
            else:
                calls[call.index] = call
        return PlannedProgram(state, tuple(calls[index] for index in sorted(calls)), results)

    def state_names(self, results: Iterable[ValueIndex]) -> frozenset[str]:
        """Return the qualified names of the parameters and buffers from which some values are computed.

        Those that are read by earlier calls, on whose results the values rest, count, and so does a value that is
        itself a parameter or buffer. The values need not be constants: what else they are computed from is left out.

        Args:
            results: the values, by index in ``Dataflow.values``.
        """
        values = (self._flow.values[value] for value in self._before(results))
        return frozenset(str(value.path[0]) for value in values if value.source == "state")

    def rests_on(self, results: Iterable[ValueIndex]) -> Literal["unknown", "input", "random"]:
        """Return why values are no constants; ``results`` are their indices, and at least one is no constant.

        ``"unknown"``: some tensor comes from code that was not recorded; else ``"input"``: they depend on an input of
        the model; else ``"random"``: random numbers.
        """
        sources = {self._flow.values[value].source for value in self._before(results)}
        return "unknown" if "unknown" in sources else "input" if "input" in sources else "random"

    def _before(self, results: Iterable[ValueIndex]) -> set[ValueIndex]:
        """Return the values ``results`` and all values from which they are computed."""
        pending, seen = list(results), set[int]()
        while pending:
            value = pending.pop()
            call = self._flow.producer(value)
            if value not in seen and call is not None:
                pending += (*call.inputs, *refs_in((*call.args, *call.kwargs.values())))
            seen.add(value)
        return seen

    def exclusive(self, weights: Iterable[tuple[ValueIndex, CallIndex]]) -> frozenset[str]:
        """Return qualified names of the parameters and buffers that only the computation of some weights reads.

        Those of a module whose call was recorded as one are left out: it counts as reading all of its own.
        ``weights`` holds ``(value, index of the call that reads it)`` for each weight and bias of a layer.
        """
        ends = set(weights)
        useful: set[ValueIndex] = set()  # constants that are read by something else, directly or not
        for value in sorted(self.values, reverse=True):
            record = self._flow.values[value]
            readers = (self._flow.calls[index] for index in record.consumers)
            if record.is_output or any(self._is_other_use(value, reader, ends, useful) for reader in readers):
                useful.add(value)
        read = {str(self._flow.values[value].path[0]) for value in useful if self._flow.is_state(value)}
        state = {str(value.path[0]) for value in self._flow.values if value.source == "state"}
        return frozenset(state - read - self._read_by_leaves)

    def _is_other_use(
        self, value: ValueIndex, reader: Call, ends: set[tuple[ValueIndex, CallIndex]], useful: set[ValueIndex]
    ) -> bool:
        """Whether a call reads a constant for something else than the weights ``ends``.

        Args:
            value: the constant.
            reader: the call.
            ends: ``(value, index of the call)`` of each weight and bias.
            useful: constants already known to be read for something else.
        """
        if (value, reader.index) in ends:
            return False
        return not self.values.issuperset(reader.outputs) or not useful.isdisjoint(reader.outputs)

    @cached_property
    def _read_by_leaves(self) -> frozenset[str]:
        """Names of the parameters and buffers of called leaves: a leaf reads all of them."""
        names = {id(tensor): name for name, tensor in _tensors(self._model)}
        leaves = {call.target for call in self._flow.calls if isinstance(call.target, nn.Module)}
        return frozenset(names[id(tensor)] for leaf in leaves for _, tensor in _tensors(leaf))


def _tensors(module: nn.Module) -> list[tuple[str, object]]:
    """Return ``(name, tensor)`` of each parameter and buffer of a module."""
    return [*module.named_parameters(), *module.named_buffers()]


def _is_random(call: Call) -> bool:
    """Whether the result of a call differs from run to run: functions such as ``rand``, dropout and ``empty``."""
    return call.name in _RANDOM or isinstance(call.target, _RANDOM_MODULES)
