"""Models that ``torch.compile`` wraps."""

from __future__ import annotations

from torch import nn

# torch.compile(model) is a module of one child, by this name, which it shares with the model.
_ORIGINAL = "_orig_mod"


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile(model)`` wraps, whose names and structure count; any other model as it is."""
    return model._modules.get(_ORIGINAL) or model


def uncompile_children(model: nn.Module) -> None:
    """Put the modules that ``torch.compile`` wrapped inside of a model back in the place of their wrappers."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = uncompiled(child)
