"""Numbers and flags among the arguments of a call: those that were recorded, and whether a later call has the same.

They are kept in a dict by position and by name, such as ``{"0": "a tensor", "input": "a tensor", "1": 0.5, "p": 0.5}``.
Every tensor is the text "a tensor".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonq.prepare.record.dataflow import Call, Ref
from tritonq.prepare.record.operations import operation_name

# By position and by name: functions of torch hand their arguments on by name, and torch.compile sees them as written.
Numbers = dict[str, Any]
_TENSOR = "a tensor"
# This argument says where a result is written, which is no part of the result: a later call may have another one.
_WHERE = "inplace"
_ANY = "any"
# A key of calls whose function has no signature that Python can read, which are compared as they are written.
_AS_WRITTEN = "as written"


def numbers_of_call(call: Call) -> Numbers:
    """Return the arguments that a recorded call gave, each under its position and under its name.

    Both ``F.dropout(x, 0.5)`` and ``F.dropout(x, p=0.5)`` give
    ``{"0": "a tensor", "input": "a tensor", "1": 0.5, "p": 0.5}``.
    If Python can't find the signature of the function, as of ``torch.clamp``, an argument has only the key by which it
    was given, and a further key "as written" is True. The argument ``inplace`` is "any".
    Tuples become lists; what is no tensor, number, text, None, list or dict becomes its ``repr``: "torch.float32".
    """
    given, names = _by_key(call.args, call.kwargs), _parameters(call.target)
    if not names:
        given[_AS_WRITTEN] = True
    for position, name in enumerate(names):
        key = name if name in given else str(position)
        if key in given:
            value = _ANY if name == _WHERE else given[key]
            given |= {name: value, str(position): value}
    return {**given, _WHERE: _ANY} if _WHERE in given else given


def has_tensors_alone(numbers: Numbers) -> bool:
    """Whether all arguments of a recorded call, as :func:`numbers_of_call` returns them, are tensors or lists of these.

    The argument ``inplace`` does not count. True for an empty dict.
    """
    return all(key == _AS_WRITTEN or value == _ANY or _is_of_tensors(value) for key, value in numbers.items())


def has_numbers(args: Sequence[Any], kwargs: Mapping[str, Any], recorded: Sequence[Numbers]) -> bool:
    """Whether a call gives the same numbers and flags as one of the recorded calls.

    Only the arguments that the call gives are compared, without ``inplace``: functions of torch hand the others on with
    their defaults. Of a function without a signature that Python can read, the recorded call must have given as many
    arguments.

    Args:
        args: positional arguments of the call.
        kwargs: named arguments of the call.
        recorded: arguments of the recorded calls, as :func:`numbers_of_call` returned them; False if empty.
    """
    given = _by_key(args, kwargs)
    return any(
        all(numbers.get(key) == value or numbers.get(key) == _ANY for key, value in given.items())
        and (_AS_WRITTEN not in numbers or len(numbers) == len(given) + 1)
        for numbers in recorded
    )


def changed_numbers(
    owner: str,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    recorded: Sequence[Numbers],
) -> str:
    """Return the text of an error: a call has other numbers or flags than were recorded, so it can't be made.

    The caller has compared them (:func:`has_numbers`). The call can't be made because it became one module together
    with another operation, and that module computes with the recorded numbers. The text begins like
    ``"mul in the forward of Net was recorded with the arguments (a tensor, 2) and is called with (a tensor, 3)"``.

    Args:
        owner: class name of the module whose forward makes the call.
        function: the called function.
        args: positional arguments of the call.
        kwargs: named arguments of the call.
        recorded: arguments of the recorded calls, as :func:`numbers_of_call` returned them; the text shows the first.
    """
    given = _by_key(args, kwargs)
    before = {key: value for key, value in recorded[0].items() if key in given and value != _ANY}
    given = {key: value for key, value in given.items() if recorded[0].get(key) != _ANY}
    return (
        f"{operation_name(function)} in the forward of {owner} was recorded with the arguments "
        f"{_shown(before)} and is called with {_shown(given)}, but it became one with the operation beside it: "
        "prepare the model again"
    )


def _by_key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Numbers:
    """Return the arguments of a call by position ("0", "1", …) and by name, with "a tensor" for each tensor."""
    return {**{str(position): _plain(value) for position, value in enumerate(args)}, **_plain(kwargs)}


def _plain(argument: Any) -> Any:
    """Return an argument in the form that JSON gives back (lists for tuples), with "a tensor" for each tensor."""
    if isinstance(argument, (Tensor, Ref)):
        return _TENSOR
    if isinstance(argument, (tuple, list)):
        return [_plain(item) for item in argument]
    if isinstance(argument, Mapping):
        return {key: _plain(item) for key, item in argument.items()}
    plain = argument is None or isinstance(argument, (bool, int, float, str, torch.SymInt, torch.SymFloat))
    return argument if plain else repr(argument)


def _is_of_tensors(value: Any) -> bool:
    return all(map(_is_of_tensors, value)) if isinstance(value, list) else bool(value == _TENSOR)


def _parameters(function: Any) -> Sequence[str]:
    """Return the names of a function's parameters by position; empty if Python can't find its signature."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _shown(arguments: Numbers) -> str:
    """Return arguments as text for a message, such as ``(a tensor, 0.5, dim=1)``."""
    shown = [f"{value}" if value == _TENSOR else repr(value) for key, value in arguments.items() if key.isdigit()]
    shown += [f"{key}={value!r}" for key, value in arguments.items() if not key.isdigit()]
    return f"({', '.join(shown)})"
