"""Load state dicts of version 0.1.0, in which layers had output quantizers that they lack today.

Today the addition or concatenation behind such a layer rounds its result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_QUANTIZER = "activation_post_process"
_FACTORY = "earlier_output"


def note_earlier_output(layer: nn.Module, factory: Callable[..., nn.Module]) -> None:
    """Let a layer without output quantizer get one when it loads a state dict with ``activation_post_process.…``.

    The layer's child ``activation_post_process`` is an ``nn.Identity`` until then. ``factory``, called without
    arguments, makes the quantizer, which gets the layer's mode and device.
    """
    setattr(layer, _FACTORY, factory)
    layer.register_load_state_dict_pre_hook(_take_quantizer)


def _take_quantizer(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Add an output quantizer to a layer if the state dict to be loaded has one; ``prefix`` is that of its keys."""
    held = any(key.startswith(f"{prefix}{_QUANTIZER}.") for key in state_dict)
    if held and isinstance(layer._modules.get(_QUANTIZER), nn.Identity):
        device = next(iter(layer.state_dict().values())).device
        layer.add_module(_QUANTIZER, getattr(layer, _FACTORY)().train(layer.training).to(device))
