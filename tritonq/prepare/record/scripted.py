"""Modules that torch.jit made: one operation each, since nothing inside can be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules import module as module_hooks


@contextmanager
def listening_to_scripted(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Call a hook after each call of modules that torch.jit made, which take no hooks of their own."""
    if not any(isinstance(module, ScriptModule) for module in modules):
        yield
        return
    handle = module_hooks.register_module_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        module_hooks._global_forward_hooks_with_kwargs.pop(handle.id, None)  # torch 2.13 keeps it
