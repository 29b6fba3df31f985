"""The integer codes that layers of a fixed-point network read: what `verify` compares there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tritonq.deploy.fixed_point_modules import IntegerLayer
from tritonq.nn.fixed_point_layer import FixedPointLayer
from tritonq.reference.fixed_point import power_of_two


def fixed_point_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers of a fixed-point network, by path; ``{}`` for other models.

    They are instances of :class:`FixedPointLayer` in a trained model and of :class:`IntegerLayer` in a converted one.
    Additions and poolings are not among them.
    """
    kinds = (FixedPointLayer, IntegerLayer)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def codes_read(layer: Any, x: Tensor) -> Tensor:
    """Return the codes that a layer computes on, for its input ``x``: whole numbers as float32, shaped as ``x``.

    Args:
        layer: one of :func:`fixed_point_layers`, in eval mode.
        x: what the layer takes. For a layer that reads the network's input, trained or converted: real values. For any
            other trained layer: real values that the layer before divided by this layer's scaling factor η. Both are
            rounded here. For any other converted layer: codes.
    """
    if isinstance(layer, IntegerLayer):
        return (layer.input.encode(x) if layer.encodes else x).float()
    source = layer.input_format
    codes: Tensor = source.quantize(x).double() * power_of_two(source.rounded_frac_len(), torch.float64)
    return codes.float()


def value_of_codes(layer: Any, codes: Tensor) -> Tensor:
    """Return the input with which a layer computes on ``codes``: the inverse of :func:`codes_read`.

    With fl the fractional length of the layer's input, it is

    - for a layer that was trained: ``codes · 2^-fl``, which is the real value divided by the layer's η;
    - for a converted layer that reads the network's input: ``codes · 2^-fl``, the real value;
    - for any other converted layer: the codes themselves, int8 or uint8.

    Args:
        layer: one of :func:`fixed_point_layers`.
        codes: whole numbers as float32, any shape.

    Returns:
        A tensor shaped as ``codes``: float32, but in the last case int8 or uint8.
    """
    if isinstance(layer, IntegerLayer):
        return codes * 2.0**-layer.input.frac_len if layer.encodes else codes.to(layer.input.dtype)
    frac_len = layer.input_format.rounded_frac_len()
    return (codes.double() / power_of_two(frac_len, torch.float64)).float()
