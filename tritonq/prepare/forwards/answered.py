"""Edit a forward without a graph: it runs as its author wrote it, and modules answer some of its calls.

A graph holds the branches that one run took. If a forward may take other branches, no graph is used. Instead the
forward runs inside of a ``TorchFunctionMode``. To *answer* a call is to return the result of a child module in place of
the torch function's. Calls are recognised by their place in the source (:mod:`tritonq.prepare.record.place`); all other
calls run as written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.nn.einsum import einsum_operands
from tritonq.nn.forward_mode import ForwardMode
from tritonq.nn.products import attention_arguments
from tritonq.prepare.forwards.checkpointed import wrap_repetitions
from tritonq.prepare.forwards.forward_warnings import tell_once
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
from tritonq.prepare.forwards.numbers import (
    changed_numbers,
    has_numbers,
    has_tensors_alone,
    numbers_of_call,
)
from tritonq.prepare.record.dataflow import Call
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
# child that the result goes through. Empty where there is none. A fifth item, where there is one, holds the arguments
# that were recorded: a call with others runs as written, or is refused where a sixth item says that other calls became
# one with it.
Answer = list[Any]
Answers = Mapping[str, Answer]
_OPERANDS: dict[Operands, str] = {
    node_operands: "tensors",
    sequence_operand: "sequence",
    first_node: "first",
    layer_operands: "layer",
    attention_operands: "attention",
    product_operands: "einsum",
}

# Children with these operands are given tensors alone.
_NUMBERS_FOLLOW_NOT = frozenset({"tensors", "sequence", "first"})
# What a call's arguments become by position.
_BY_POSITION = {"layer": layer_arguments, "attention": attention_arguments, "einsum": einsum_operands}


class AnsweredForward:
    """Collect the edits of a forward that keeps its branches, with the methods of ``ForwardGraph``.

    The argument ``node`` of these methods is here the place of a call: ``Call.place`` of
    :class:`~tritonq.prepare.record.dataflow.Call`, such as ``"models.net:Net.forward:3.8-3.20#0"``.

    Args:
        reason: why no graph can stand for the forward; "" if not told.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        self._answers: dict[str, Answer] = {}
        self._expected: dict[bool, set[str]] = {False: set(), True: set()}
        self._recorded: dict[str, list[Any]] = {}
        self._joined: set[str] = set()

    def expect(self, call: Call, training: bool) -> None:
        """Note that the forward made a recorded call, with ``training`` the mode of that run.

        A later run in the same mode that does not make the call warns, if the call is edited. The numbers and flags of
        the call are noted, too: :meth:`replace` says what becomes of a later call with others.
        """
        self._expected[training].add(call.place)
        arguments = numbers_of_call(call)
        if arguments not in self._recorded.setdefault(call.place, []):
            self._recorded[call.place].append(arguments)

    def replace(self, node: str, child: str, operands: Operands, in_place: bool = False, joined: bool = False) -> None:
        """Let a child module answer a call.

        Args:
            node: place of the call.
            child: name of the child module.
            operands: the function of ``graph.py`` that returns the child's arguments, given a node: ``node_operands``
                for example. Here it only says which arguments of the call the child gets.
            in_place: not used here; a graph needs it.
            joined: whether the child computes other calls, too, which were erased. It matters where the child gets only
                tensors, and :meth:`expect` noted numbers or flags of the call. If a later run makes the call with
                others, its forward raises ValueError if ``joined``; else the call runs as written, and its result is
                rounded by the child of :meth:`insert_after`, or without one by the output quantizer of ``child``.
        """
        self._answer(node)[:3] = ["replace", child, _OPERANDS[operands]]
        if joined:
            self._joined.add(node)

    def insert_after(self, node: str, child: str, in_place: bool = False) -> None:
        """Pass the result of the call at the place ``node`` through a child module; ``in_place`` is not used here."""
        self._answer(node)[3] = child

    def erase(self, node: str) -> None:
        """Let the call at the place ``node`` return its first tensor argument instead of its result."""
        self._answer(node)[:3] = ["erase", "", "first"]
        self._joined.add(node)

    def _answer(self, node: str) -> Answer:
        """Return the answer to the call at the place ``node``, to be changed; a new one says to run it as written."""
        return self._answers.setdefault(node, ["run", "", "", ""])

    def to_data(self) -> dict[str, Any]:
        """Return the edits as plain data for JSON: ``{"answers": …, "expected": …}``.

        "answers" has a list by place: ``"run"``, ``"replace"`` or ``"erase"``; the child that replaces the call; the
        kind of its operands, such as ``"tensors"``; the child that the result goes through. The last three are "" where
        there is none. If the kind is "tensors", "sequence" or "first" and the recorded arguments are not only tensors,
        a fifth item lists them, as ``numbers_of_call`` returns them, for each recorded call at the place; a sixth item
        is True where the call is erased or its child computes others too.
        "expected" has for "eval" and "train" the places of edited calls that the recorded run in this mode made.
        """
        modes = {"eval": self._expected[False], "train": self._expected[True]}
        expected = {mode: sorted(places & self._answers.keys()) for mode, places in modes.items()}
        return {"answers": {node: self._with_arguments(node) for node in self._answers}, "expected": expected}

    def _with_arguments(self, node: str) -> Answer:
        """Return the answer at the place ``node``, with the recorded arguments if these include more than tensors."""
        answer, recorded = self._answers[node], self._recorded.get(node, [])
        if answer[2] not in _NUMBERS_FOLLOW_NOT or all(map(has_tensors_alone, recorded)):
            return answer
        return [*answer, recorded, *([True] if node in self._joined else [])]


def check_answers(answers: Any, children: Iterable[str], owner: str) -> None:
    """Check that data are the "answers" of :meth:`AnsweredForward.to_data`.

    Args:
        answers: the data, from a file for example.
        children: names of the children that the forward may call.
        owner: class name of the module, for messages.

    Raises:
        ValueError: the data are no such dict, or name another child. Items behind the fourth are not checked.
    """
    known = set(children)
    if not isinstance(answers, Mapping):
        raise ValueError(f"answers of a forward must be a mapping of places, got {type(answers).__qualname__}")
    for place, answer in answers.items():
        well_formed = isinstance(answer, list) and len(answer) in (4, 5, 6) and answer[0] in ("run", "replace", "erase")
        well_formed = well_formed and all(isinstance(text, str) for text in answer[:4])
        if not well_formed or answer[2] not in (*_OPERANDS.values(), ""):
            raise ValueError(f"not an answer to a call: {place!r}: {answer!r}")
        for child in answer[1:4:2]:
            if child and child not in known:
                raise ValueError(f"the forward calls the child {child!r}, which {owner} doesn't have")


def answering(
    original: Callable[..., Any], answers: Answers, expected: Mapping[str, Sequence[str]] | None = None
) -> Callable[..., Any]:
    """Return a forward that runs ``original`` while children of its module answer some of the calls.

    Args:
        original: the forward as its author wrote it, called with the module first.
        answers: the answer to each call, by place: a list of four texts, "" where there is none. The first is "run" (as
            written), "replace" (by a child), or "erase" (the first tensor argument is returned). Then come the child's
            name, what the child gets of the call's arguments (a text of ``_OPERANDS``, such as "tensors" for all
            tensors), and the name of a child that the result goes through. A fifth item holds the arguments that were
            recorded: a call with others runs as written, and its result is rounded as the child's would be. If there is
            a sixth item, such a call raises ValueError.
        expected: for "eval" and "train", the places of calls that a run in this mode makes; a run that leaves one out,
            or makes it with others than the recorded arguments, warns, once per module. None: no run warns.
    """
    places = frozenset(key.rpartition("#")[0] for key in answers)
    functions = frozenset(function_of_place(place) for place in places)
    expected = expected or {}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = Answering(self, answers, places, functions)
        with mode:
            result = original(self, *args, **kwargs)
        missing = mode.missing(expected.get("train" if self.training else "eval", ()))
        if missing:
            tell_once(self, mode.description(missing))
        return result

    return forward


class Answering(ForwardMode):
    """The torch function mode that answers the calls of one run of a forward; each run makes a new one.

    Args:
        owner: the module whose forward runs.
        answers: how each call is answered, by place: a list of "run", "replace" or "erase", the name of the child that
            replaces the call, what operands that child gets, and the name of the child that the result goes through.
            The comment of ``Answer`` in this file has the details.
        places: the places of these calls without ``#0``, the count of earlier calls at the same place in the run. A
            call elsewhere runs as written.
        functions: the parts of the places that name functions, such as ``"models.net:Net.forward"``. They tell
            quickly that a call in another function runs as written.
    """

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
        if len(answer) > 4 and not has_numbers(args, kwargs, answer[4]):
            if len(answer) > 5:
                raise ValueError(changed_numbers(type(self._owner).__name__, func, args, kwargs, answer[4]))
            self._differing.add(key)
            return self._rounded(child, then, func(*args, **kwargs))
        if operands == "layer":
            check_geometry(getattr(self._owner, child), operation_name(func), args, kwargs)
        result = func(*args, **kwargs) if kind == "run" else self._replaced(child, operands, args, kwargs)
        return getattr(self._owner, then)(result) if then else result

    def _rounded(self, child: str, then: str, result: Any) -> Any:
        """Return the result of a call with other arguments than recorded, rounded by the quantizer of its place.

        ``child`` is the module that would have answered the call, ``then`` the child after it ("" for none).
        """
        if then:
            return getattr(self._owner, then)(result)
        made = getattr(self._owner, child)
        own = made.output_quantizer if hasattr(made, "output_quantizer") else made.activation_post_process
        return result if own is None else own(result)

    def _running_place(self) -> str:
        """Return the place of the call that is running.

        Returns "" if the calling function has no answered call, or if the call is inside of another module.
        """
        caller = calling_frame(sys._getframe(2))
        # Most calls are those of layers inside: their function says so, without a look at who called whom.
        if caller is None or function_name(caller) not in self._functions:
            return ""
        return place_in_forward(caller, _is_answered, _HANDLER)

    def _repeated(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, which a checkpoint runs again in the backward, wrapped: it answers the same calls."""
        counts = dict(self._counts)

        def repeated(*args: Any) -> Any:
            mode = Answering(self._owner, self._answers, self._places, self._functions)
            mode._counts = dict(counts)
            with mode:
                return function(*args)

        return repeated

    def missing(self, expected: Sequence[str]) -> list[str]:
        """Return the places in ``expected`` where this run made no call, or one with other arguments than recorded.

        It is called after the run.
        """
        found = []
        for key in expected:
            place, _, occurrence = key.rpartition("#")
            if self._counts.get(place, 0) <= int(occurrence) or key in self._differing:
                found.append(key)
        return found

    def description(self, missing: Sequence[str]) -> str:
        """Return the text of a warning about calls that this run did not make as recorded.

        ``missing`` are their places, from :meth:`missing`.
        """
        what = f" ({children})" if (children := self._children_of(missing)) else ""
        return (
            f"{len(missing)} calls of the forward of {type(self._owner).__name__} that prepare_qat recorded did not "
            f"come, or with other arguments{what}: it took another branch, which runs in float, a number in it "
            "changed, or its source did"
        )

    def _children_of(self, keys: Sequence[str]) -> str:
        """Return the names of the children that answer the calls at some places, as text."""
        return ", ".join(sorted({child for key in keys for child in self._answers[key][1:4:2] if child}))

    def _replaced(self, child: str, operands: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of ``child`` for the operands of a call; the first operand if ``child`` is ""."""
        if operands in _BY_POSITION:
            return getattr(self._owner, child)(*_BY_POSITION[operands](args, kwargs))
        if operands == "sequence":
            return getattr(self._owner, child)(args[0] if args else kwargs["tensors"])
        tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
        if not child:
            return tensors[0]
        return getattr(self._owner, child)(*(tensors[:1] if operands == "first" else tensors))


_HANDLER = Answering.__torch_function__.__code__
_FORWARD = next(code for code in answering.__code__.co_consts if getattr(code, "co_name", "") == "forward")
_REPEATED = next(code for code in Answering._repeated.__code__.co_consts if getattr(code, "co_name", "") == "repeated")


def _is_answered(frame: FrameType) -> bool:
    """Whether a frame of Python runs a forward that :func:`answering` made, or a function that is run again for it."""
    code = source_code(frame.f_code)
    return code is _FORWARD or code is _REPEATED


def _place_in_trace() -> str:
    """Return the place of the call that ``torch.compile`` is tracing; "" if it has none.

    The second function that Dynamo traces, counted from inside, is the one that calls the torch function.
    """
    places = traced_places()
    return "" if len(places) < 2 or places[1][0] is _HANDLER else places[1][1]


# As torch.compiler.assume_constant_result does, which imports all of Dynamo.
_place_in_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]
