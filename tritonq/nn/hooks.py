"""Hooks that users put on a prepared model: find out which of them change the tensors that they see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class WatchedHook:
    """A forward hook or forward pre-hook, which remembers whether it ever changed what it was given.

    Args:
        hook: the hook.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook, self.changes = hook, False

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Return what the hook returns."""
        before = _versions(given)
        result = self.hook(module, *given)
        # A pre-hook may return (args,) or the one argument; with keywords (args, kwargs).
        given_back = result is None or _same(result, given[-1]) or _same((result,), given[-1]) or _same(result, given)
        if not given_back or _versions(given) != before:
            self.changes = True
        return result


def _same(result: Any, given: Any) -> bool:
    """Whether a hook's result is what it was given, or a tuple of the same objects."""
    if result is given:
        return True
    is_pair = isinstance(result, tuple) and isinstance(given, tuple) and len(result) == len(given)
    return is_pair and all(_same(item, other) for item, other in zip(result, given, strict=True))


def _versions(given: Any) -> list[int]:
    """Return how often the tensors among a hook's arguments were changed in place."""
    if isinstance(given, torch.Tensor):
        return [] if given.is_inference() else [given._version]
    return [count for item in given for count in _versions(item)] if isinstance(given, tuple) else []


class HookPlace(NamedTuple):
    """A module's hooks that a tensor passes: those on what the module returns, or those on what it is given.

    Attributes:
        name: the module's qualified name.
        hooks: the hooks by their keys: the module's own dict.
        known: keys of the hooks that were there when the model was recorded.
    """

    name: str
    hooks: dict[int, Callable[..., Any]]
    known: frozenset[int]

    def unwatched(self) -> list[int]:
        """Return the keys of users' hooks that were put here since and are not watched."""
        return [
            key
            for key, hook in self.hooks.items()
            if key not in self.known
            and not isinstance(hook, WatchedHook)
            and not str(getattr(hook, "__module__", "")).startswith(("torch.", "tritonq."))
        ]
