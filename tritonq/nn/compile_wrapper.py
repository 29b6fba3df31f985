"""Undo ``torch.compile`` on models and on modules inside of them."""

from __future__ import annotations

from torch import nn
from torch.jit import ScriptModule

# torch.compile(model) is a module of this class with one child, by this name, which it shares with the model.
_WRAPPER = ("torch._dynamo.eval_frame", "OptimizedModule")
_ORIGINAL = "_orig_mod"


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the very model inside of what ``torch.compile(model)`` returned, not a copy; any other model as it is."""
    # By name: importing the class takes a second, and who has no such model has not paid it yet.
    kinds = ((kind.__module__, kind.__qualname__) for kind in type(model).__mro__)
    original = getattr(model, _ORIGINAL) if _WRAPPER in kinds else None
    return original if isinstance(original, nn.Module) else model


def uncompile_children(model: nn.Module) -> None:
    """Undo ``torch.compile`` on modules inside of a model, and ``module.compile()`` on these and the model, in place.

    A wrapper around the model itself stays: :func:`uncompiled` returns what is inside of it.
    """
    for module in list(model.modules()):
        if isinstance(module, ScriptModule):
            continue
        vars(module).pop("_compiled_call_impl", None)
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = uncompiled(child)
