"""Load state dicts of float models: a BatchNorm that is part of a layer now is found under its float model's name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tritonq.prepare.decide.layers import Layer

_NAMES = "tritonq_batch_norm_names"


def note_batch_norms(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Let a prepared model load the state of its BatchNorms from a state dict of the float model.

    The model gets a hook that renames such entries before they are loaded, and an attribute with the names. ``layers``
    are all layers of the plan; BatchNorms are part of some of them now.
    """
    names = {layer.batch_norm: layer.name for layer in layers if layer.batch_norm is not None}
    if names:
        setattr(model, _NAMES, names)
        model.register_load_state_dict_pre_hook(_move_batch_norms)


def _move_batch_norms(model: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Rename the entries of BatchNorms to those of their layers; torch calls this before it loads a state dict.

    An entry is renamed only if the state dict has none under the new name, and if the model still has the layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in getattr(model, _NAMES, {}).items():
        bn = modules.get(f"{layer}.bn")
        for key in () if bn is None else bn.state_dict():
            old, new = f"{prefix}{name}.{key}", f"{prefix}{layer}.bn.{key}"
            if old in state_dict and new not in state_dict:
                state_dict[new] = state_dict.pop(old)
