"""Find out whether a module's own code can behave differently in training."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn


def reads_mode(kind: type[nn.Module]) -> bool:
    """Whether any method of a class, or of its bases except ``nn.Module``, reads an attribute called ``training``.

    It may be that of any object, and a method that only sets it counts, too. A method that
    hands the module to a function which reads the mode is not found.
    """
    bases = (base for base in kind.__mro__ if base not in (nn.Module, object))
    return any("training" in code.co_names for base in bases for code in _code_of(vars(base).values()))


def _code_of(items: Any) -> Iterator[CodeType]:
    """Yield the code objects of functions, properties and static or class methods, and of functions inside them.

    Of a function that a decorator wrapped both the wrapper's and its own are among them.
    """
    for item in items:
        if isinstance(item, property):
            yield from _code_of((item.fget,))
        function = getattr(item, "__func__", item)
        if hasattr(function, "__wrapped__"):
            yield from _code_of((function.__wrapped__,))
        code = item if isinstance(item, CodeType) else function.__code__ if isinstance(function, FunctionType) else None
        if code is not None:
            yield code
            yield from _code_of(constant for constant in code.co_consts if isinstance(constant, CodeType))
