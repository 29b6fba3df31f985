"""Recognise recorded calls that compute with one tensor and a number: ``x * 2``, ``1 - x``, ``-x``, ``x.square()``.

The private functions read the arguments of one kind of call. They have the parameters of the torch function, and raise
TypeError or ValueError for arguments that they can't take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tritonq.prepare.decide.read_call import read_call
from tritonq.prepare.record.dataflow import Call, Ref
from tritonq.reference.functions import Function


def arithmetic_of_call(call: Call) -> Function | None:
    """Return the ``Function`` that a call computes of one tensor and at most one number; None for other calls.

    ``x + 2`` gives ``Function("plus", (2.0,))``; others are "times", "over" (x / a), "from" (a - x), "ratio" (a / x),
    and, without numbers, "square" and "abs". ``x - 2`` is "plus" of -2.0, and ``-x`` is "times" of -1.0.
    """
    if call.kind != "function":
        return None
    spelling = getattr(call.target, "__name__", "").strip("_")
    return read_call(call, _READERS, spelling if spelling in _REFLECTED else call.name)


def has_number(call: Call) -> bool:
    """Whether a call is arithmetic of one tensor with a number: True for ``x * 2``, False for ``-x`` and ``abs(x)``.

    The arithmetic is ``+``, ``-``, ``*`` and ``/`` with a finite number (not ``x / 0``), and ``x ** 2``. Other powers,
    ``x.square()``, clamps and floor divisions give False, and so does a tensor of one element in place of the number.
    """
    return arithmetic_of_call(call) is not None and len(call.args) + len(call.kwargs) > 1


def _number(value: Any) -> float:
    """Return a value as a float; raise TypeError if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"no finite number: {value!r}")
    return float(value)


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Function:
    """Return the function ``input + alpha * other``, in which one of the two is a number: "plus" of the number."""
    if isinstance(input, Ref):
        return Function("plus", (_number(other) * _number(alpha),))
    return _scaled(alpha, Function("plus", (_number(input),)))


def _subtract(input: Any, other: Any, *, alpha: Any = 1) -> Function:
    """Return the function ``input - alpha * other`` of one tensor and a number: "plus" of -number, or "from"."""
    if isinstance(input, Ref):
        return Function("plus", (-_number(other) * _number(alpha),))
    return _scaled(alpha, Function("from", (_number(input),)))


def _scaled(alpha: Any, behind: Function) -> Function:
    """Return the function ``behind``, after a multiplication by ``alpha`` if that is not 1."""
    return behind if alpha == 1 else Function("times", (_number(alpha),)).then(behind)


def _subtract_from(input: Ref, other: Any, alpha: Any = 1) -> Function:
    """Return the function ``other - alpha * input``, as ``torch.rsub`` has it: "from"."""
    return _subtract(other, input, alpha=alpha)


def _multiply(input: Any, other: Any) -> Function:
    return Function("times", (_number(other if isinstance(input, Ref) else input),))


def _divide(input: Ref, other: Any, *, rounding_mode: None = None) -> Function:
    if rounding_mode is not None or other == 0:
        raise ValueError("no quotient by a number")
    return Function("over", (_number(other),))


def _divide_into(input: Ref, other: Any) -> Function:
    return Function("ratio", (_number(other),))


def _reciprocal(input: Ref) -> Function:
    return Function("ratio", (1.0,))


def _negative(input: Ref) -> Function:
    return Function("times", (-1.0,))


def _square(input: Ref) -> Function:
    return Function("square")


def _power(input: Ref, exponent: Any) -> Function:
    if exponent != 2:
        raise ValueError("no square")
    return Function("square")


def _magnitude(input: Ref) -> Function:
    return Function("abs")


# Spellings of operators whose tensor stands on the right.
_REFLECTED = frozenset({"rsub", "rdiv", "rtruediv", "rpow"})
_READERS: Mapping[str, Callable[..., Function]] = {
    "add": _add,
    "sub": _subtract,
    "rsub": _subtract_from,
    "mul": _multiply,
    "div": _divide,
    "rdiv": _divide_into,
    "rtruediv": _divide_into,
    "reciprocal": _reciprocal,
    "neg": _negative,
    "negative": _negative,
    "square": _square,
    "pow": _power,
    "abs": _magnitude,
}
