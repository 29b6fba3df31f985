"""The arguments of a module's call: by position, as hooks are given them, and the names that a forward takes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def names_taken(signature: inspect.Signature) -> frozenset[str]:
    """Return the names of the parameters that an argument can be given to by name.

    The names of ``*args``, of ``**kwargs`` and of positional-only parameters are not among them: an argument of such a
    name goes to ``**kwargs``.
    """
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(name for name, parameter in signature.parameters.items() if parameter.kind in by_name)


def by_position(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call of ``module``, those given by name, too, in the order of its forward's parameters.

    For ``forward(x, mask=None, size=1)`` and the call ``module(x, mask=m)`` the result is ``(x, m, 1)``: defaults stand
    for what was not given. Without ``kwargs`` it is ``args`` as it is, without defaults. Keyword-only arguments and
    those that the forward takes as ``**kwargs`` are left out.

    Raises:
        TypeError: ``kwargs`` are given, and the arguments don't fit the forward.
    """
    if not kwargs:
        return args
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args
