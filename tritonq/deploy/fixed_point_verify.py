"""The integer codes that layers of a fixed-point network read: what `verify` compares there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tritonq.deploy.fixed_point_modules import IntegerLayer
from tritonq.nn.fixed_point_layer import FixedPointLayer
from tritonq.reference.fixed_point import power_of_two


def fixed_point_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a fixed-point network, trained or converted, by name; ``{}`` for any other model."""
    kinds = (FixedPointLayer, IntegerLayer)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def codes_read(layer: Any, x: Tensor) -> Tensor:
    """Return the codes that a layer computes on, for its input ``x``: whole numbers as float32, shaped as ``x``."""
    if isinstance(layer, IntegerLayer):
        return (layer.input.encode(x) if layer.encodes else x).float()
    source = layer.input_format
    codes: Tensor = source.quantize(x).double() * power_of_two(source.rounded_frac_len(), torch.float64)
    return codes.float()


def value_of_codes(layer: Any, codes: Tensor) -> Tensor:
    """Return the input with which a layer computes on ``codes``: the inverse of :func:`codes_read`."""
    if isinstance(layer, IntegerLayer):
        return codes * 2.0**-layer.input.frac_len if layer.encodes else codes.to(layer.input.dtype)
    frac_len = layer.input_format.rounded_frac_len()
    return (codes.double() / power_of_two(frac_len, torch.float64)).float()
