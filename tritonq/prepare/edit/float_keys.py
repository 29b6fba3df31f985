"""Load state dicts of float models: a BatchNorm that is part of a layer now is found under its float model's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_NAMES = "tritonq_batch_norm_names"


def note_batch_norms(model: nn.Module, layers: Mapping[str, str]) -> None:
    """Let a prepared model load the state of its BatchNorms from a state dict of the float model.

    ``layers`` has the name of the layer that each BatchNorm is part of now, by the BatchNorm's name in the float model.
    """
    if layers:
        setattr(model, _NAMES, dict(layers))
        model.register_load_state_dict_pre_hook(_move_batch_norms)


def _move_batch_norms(model: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Rename the entries of BatchNorms to those of their layers; torch calls this before it loads a state dict.

    An entry is renamed only if the state dict has none under the new name.
    """
    for name, layer in getattr(model, _NAMES, {}).items():
        bn = model.get_submodule(layer)._modules.get("bn")
        for key in () if bn is None else bn.state_dict():
            old, new = f"{prefix}{name}.{key}", f"{prefix}{layer}.bn.{key}"
            if old in state_dict and new not in state_dict:
                state_dict[new] = state_dict.pop(old)
