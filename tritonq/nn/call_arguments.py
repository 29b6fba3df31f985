"""The arguments of a module's call, as hooks are given them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def by_position(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call of ``module`` in the order of its forward's parameters, those given by name, too.

    Defaults stand for those that were not given. Without ``kwargs`` the result is ``args`` as it is, without defaults.
    Keyword-only arguments are left out.

    Raises:
        TypeError: ``kwargs`` are given, and the arguments don't fit the forward.
    """
    if not kwargs:
        return args
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args
