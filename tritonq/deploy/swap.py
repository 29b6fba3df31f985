"""Putting deployed modules in the place of trained ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tritonq.prepare.edit.fuse import move_hooks


def swap_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace children of ``model`` everywhere, and return it; forward and backward hooks move to the replacement.

    Args:
        model: changed in place.
        replacements: by each module to replace, what replaces it. If ``model`` is a key, its replacement is returned.
    """
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in replacements:
                module._modules[name] = replacements[child]
    for original, replacement in replacements.items():
        move_hooks(original, original, replacement)
    return replacements.get(model, model)
