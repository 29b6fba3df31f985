"""Forwards that run as their author wrote them while modules answer some of their calls.

A graph has the branches of one run. Where a forward may take others, it keeps running itself, in a
``TorchFunctionMode`` that hands the recorded calls, known by their place in the source, to modules. Any other call runs
as written.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.nn.einsum import einsum_operands
from tritonq.nn.forward_mode import ForwardMode
from tritonq.nn.products import attention_arguments
from tritonq.prepare.forwards.checkpointed import wrap_repetitions
from tritonq.prepare.forwards.geometry import check_geometry
from tritonq.prepare.forwards.graph import (
    Operands,
    attention_operands,
    first_node,
    layer_arguments,
    layer_operands,
    node_operands,
    product_operands,
    sequence_operand,
)
from tritonq.prepare.record.operations import operation_name
from tritonq.prepare.record.place import (
    calling_frame,
    function_name,
    function_of_place,
    place_in_forward,
    source_code,
    traced_places,
)

# How a call is answered: "run" as written, "replace" or "erase"; the child that replaces it; that child's operands; the
# child that the result goes through. Empty where there is none. A fifth item, where there is one, holds the recorded
# arguments behind the first and the named ones: a call with others runs as written.
Answer = list[Any]
Answers = Mapping[str, Answer]
# Those of a call behind the first, and its named ones.
Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
_OPERANDS: dict[Operands, str] = {
    node_operands: "tensors",
    sequence_operand: "sequence",
    first_node: "first",
    layer_operands: "layer",
    attention_operands: "attention",
    product_operands: "einsum",
}

# What a call's arguments become by position.
_BY_POSITION = {"layer": layer_arguments, "attention": attention_arguments, "einsum": einsum_operands}


class AnsweredForward:
    """Edits of a forward that keeps its branches; the interface is that of ``ForwardGraph``.

    A call is named by its place, as :class:`~tritonq.prepare.record.dataflow.Call` has it.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        self._answers: dict[str, Answer] = {}
        self._expected: dict[bool, set[str]] = {False: set(), True: set()}

    def expect(self, node: str, training: bool) -> None:
        """Note that the forward made a call when it was recorded in this mode."""
        self._expected[training].add(node)

    def replace(self, node: str, child: str, operands: Operands, in_place: bool = False) -> None:
        """Let the child module answer a call, given its operands."""
        self._answer(node)[:3] = ["replace", child, _OPERANDS[operands]]

    def insert_after(self, node: str, child: str, in_place: bool = False) -> None:
        """Pass the result of a call through the child module."""
        self._answer(node)[3] = child

    def require(self, node: str, arguments: Arguments) -> None:
        """Let a call that was replaced run as written where its further arguments are not these."""
        self._answer(node)[4:] = [[_plain(argument) for argument in arguments]]

    def erase(self, node: str) -> None:
        """Let a call return its first operand."""
        self._answer(node)[:3] = ["erase", "", "first"]

    def _answer(self, node: str) -> Answer:
        return self._answers.setdefault(node, ["run", "", "", ""])

    def to_data(self) -> dict[str, Any]:
        """Return plain data that JSON can hold: the answers, and which of their calls each mode is expected to make."""
        modes = {"eval": self._expected[False], "train": self._expected[True]}
        expected = {mode: sorted(places & self._answers.keys()) for mode, places in modes.items()}
        return {"answers": dict(self._answers), "expected": expected}


def check_answers(answers: Any, children: Iterable[str], owner: str) -> None:
    """Raise unless ``answers`` is what :meth:`AnsweredForward.to_data` makes and calls only these children.

    Raises:
        ValueError: anything else.
    """
    known = set(children)
    if not isinstance(answers, Mapping):
        raise ValueError(f"answers of a forward must be a mapping of places, got {type(answers).__qualname__}")
    for place, answer in answers.items():
        well_formed = isinstance(answer, list) and len(answer) in (4, 5) and answer[0] in ("run", "replace", "erase")
        if not well_formed or answer[2] not in (*_OPERANDS.values(), ""):
            raise ValueError(f"not an answer to a call: {place!r}: {answer!r}")
        for child in answer[1::2]:
            if child and child not in known:
                raise ValueError(f"the forward calls the child {child!r}, which {owner} doesn't have")


def answering(
    original: Callable[..., Any], answers: Answers, expected: Mapping[str, Sequence[str]] | None = None
) -> Callable[..., Any]:
    """Return a forward that runs ``original`` and answers the calls in ``answers`` with children of its module.

    It warns once where a call does not come that ``expected`` names for the mode.
    """
    places = frozenset(key.rpartition("#")[0] for key in answers)
    functions = frozenset(function_of_place(place) for place in places)
    expected = expected or {}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = Answering(self, answers, places, functions)
        with mode:
            result = original(self, *args, **kwargs)
        missing = mode.missing(expected.get("train" if self.training else "eval", ()))
        if missing and torch.compiler.is_compiling():
            _warn_in_trace(type(self).__name__, len(missing), mode.children_of(missing))
        elif missing:
            mode.tell(missing)
        return result

    return forward


class Answering(ForwardMode):
    """Answers the recorded calls of one run of a forward. One object serves one run, so threads do not share it."""

    def __init__(self, owner: nn.Module, answers: Answers, places: frozenset[str], functions: frozenset[str]) -> None:
        super().__init__()
        self._owner, self._answers, self._places = owner, answers, places
        self._functions = functions
        self._counts: dict[str, int] = {}
        self._differing: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        place = _place_in_trace() if torch.compiler.is_dynamo_compiling() else self._running_place()
        if place not in self._places:
            return func(*args, **kwargs)
        if not torch.compiler.is_dynamo_compiling():
            wrap_repetitions(sys._getframe(1), _is_answered, self._repeated)
        count = self._counts.get(place, 0)
        self._counts[place] = count + 1
        key = f"{place}#{count}"
        answer = self._answers.get(key)
        if answer is None:
            return func(*args, **kwargs)
        kind, child, operands, then = answer[:4]
        if len(answer) > 4 and [_plain(args[1:]), _plain(kwargs)] != answer[4]:
            self._differing.add(key)
            return self._rounded(child, then, func(*args, **kwargs))
        if operands == "layer":
            check_geometry(getattr(self._owner, child), operation_name(func), args, kwargs)
        result = func(*args, **kwargs) if kind == "run" else self._replaced(child, operands, args, kwargs)
        return getattr(self._owner, then)(result) if then else result

    def _rounded(self, child: str, then: str, result: Any) -> Any:
        """Return what a call made that had other arguments than recorded, through the quantizer that stands there."""
        own = getattr(self._owner, then) if then else getattr(self._owner, child).output_quantizer
        return result if own is None else own(result)

    def _running_place(self) -> str:
        """Return the place that called, or "" in a function without answers, or inside of another module."""
        caller = calling_frame(sys._getframe(2))
        # Most calls are those of layers inside: their function says so, without a look at who called whom.
        if caller is None or function_name(caller) not in self._functions:
            return ""
        return place_in_forward(caller, _is_answered, _HANDLER)

    def _repeated(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of the forward as a backward runs it again: its calls are answered as they were."""
        counts = dict(self._counts)

        def repeated(*args: Any) -> Any:
            mode = Answering(self._owner, self._answers, self._places, self._functions)
            mode._counts = dict(counts)
            with mode:
                return function(*args)

        return repeated

    def missing(self, expected: Sequence[str]) -> list[str]:
        """Return the recorded calls that this run did not make, or with other arguments."""
        found = []
        for key in expected:
            place, _, occurrence = key.rpartition("#")
            if self._counts.get(place, 0) <= int(occurrence) or key in self._differing:
                found.append(key)
        return found

    def tell(self, missing: Sequence[str]) -> None:
        """Warn, once per module, of recorded calls that this run did not make."""
        if not getattr(self._owner, _TOLD, False):
            setattr(self._owner, _TOLD, True)
            _warn(type(self._owner).__name__, len(missing), self.children_of(missing), stacklevel=4)

    def children_of(self, keys: Sequence[str]) -> str:
        """Return the names of the children that would have answered some calls."""
        return ", ".join(sorted({child for key in keys for child in self._answers[key][1::2] if child}))

    def _replaced(self, child: str, operands: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the child makes of the operands of a call, or the first one where no child replaces it."""
        if operands in _BY_POSITION:
            return getattr(self._owner, child)(*_BY_POSITION[operands](args, kwargs))
        given = (*args, *kwargs.values())
        if operands == "sequence":
            return getattr(self._owner, child)(given[0])
        tensors = [item for item in given if isinstance(item, Tensor)]
        if not child:
            return tensors[0]
        return getattr(self._owner, child)(*(tensors[:1] if operands == "first" else tensors))


def _warn(owner: str, count: int, children: str, stacklevel: int) -> None:
    what = f" ({children})" if children else ""
    warnings.warn(
        f"{count} calls of the forward of {owner} that prepare_qat recorded did not come, or with other "
        f"arguments{what}: it took another branch, which runs in float, a number in it changed, or its source did",
        stacklevel=stacklevel,
    )


def _warn_in_trace(owner: str, count: int, children: str) -> None:
    """Warn while ``torch.compile`` traces: a graph has no warnings."""
    _warn(owner, count, children, stacklevel=2)


def _plain(argument: Any) -> Any:
    """Return an argument as JSON gives it back."""
    if isinstance(argument, (tuple, list)):
        return [_plain(item) for item in argument]
    return {key: _plain(item) for key, item in argument.items()} if isinstance(argument, Mapping) else argument


_TOLD = "_tritonq_told_missing"
_HANDLER = Answering.__torch_function__.__code__
_FORWARD = next(code for code in answering.__code__.co_consts if getattr(code, "co_name", "") == "forward")
_REPEATED = next(code for code in Answering._repeated.__code__.co_consts if getattr(code, "co_name", "") == "repeated")


def _is_answered(frame: FrameType) -> bool:
    code = source_code(frame.f_code)
    return code is _FORWARD or code is _REPEATED


def _place_in_trace() -> str:
    """Return the place while ``torch.compile`` traces: the second translator is that of the mode's caller."""
    places = traced_places()
    return "" if len(places) < 2 or places[1][0] is _HANDLER else places[1][1]


# As torch.compiler.assume_constant_result does, which imports all of Dynamo.
_place_in_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]
_warn_in_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]
