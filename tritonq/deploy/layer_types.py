"""The deployed layers, by the float layers whose geometry they have.

``y = relu?((Σ (x_code - x_zero)(w_code - w_zero) + bias_code) · multiplier)``, then the output quantizer, as
:class:`QuantizedLayer` says it; scales of the weight are per out channel.
"""

from __future__ import annotations

from torch import nn

from tritonq.deploy.modules import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose2d,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedTransposed,
)


class QuantizedConvTranspose1d(QuantizedTransposed, nn.ConvTranspose1d):  # type: ignore[misc]
    """``nn.ConvTranspose1d`` of a converted model: a :class:`QuantizedTransposed`."""

    float_type = nn.ConvTranspose1d


class QuantizedConvTranspose3d(QuantizedTransposed, nn.ConvTranspose3d):  # type: ignore[misc]
    """``nn.ConvTranspose3d`` of a converted model: a :class:`QuantizedTransposed`."""

    float_type = nn.ConvTranspose3d


# By the float layer that a quantization-aware layer is derived from.
LAYER_TYPES: dict[type[nn.Module], type[QuantizedLayer]] = {
    cls.float_type: cls
    for cls in (
        *(QuantizedConv1d, QuantizedConv2d, QuantizedConv3d, QuantizedLinear),
        *(QuantizedConvTranspose1d, QuantizedConvTranspose2d, QuantizedConvTranspose3d),
    )
}
