"""Observe modules that torch.jit made: each call is one operation, since nothing inside of it can be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules import module as module_hooks


@contextmanager
def listening_to_scripted(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Call ``hook`` after each module call while the block runs, if ``modules`` holds one that torch.jit made.

    Such modules take no hooks of their own, so that the hook is registered for all modules of the process. It must
    return None for those that are not torch.jit's or not in ``modules``. What else it returns replaces the result.

    Args:
        modules: all modules of the model.
        hook: called with module, positional arguments, named arguments and result, as a forward hook of torch.
    """
    if not any(isinstance(module, ScriptModule) for module in modules):
        yield
        return
    handle = module_hooks.register_module_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        module_hooks._global_forward_hooks_with_kwargs.pop(handle.id, None)  # torch 2.13 keeps it
