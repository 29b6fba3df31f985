"""Clips (ReLU6, clamp) written as bounds of codes, for ONNX Runtime.

Rounding keeps the order: ``quantize(min(y, b)) = min(quantize(y), quantize(b))``. So the quantizer behind a clip moves
to the layer before it, with which ONNX Runtime makes one integer operation, and the bounds become a Clip of its codes.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from tritonq.deploy.modules import QuantizedLayer, Quantizer
from tritonq.deploy.onnx_quantizers import TracedQuantizer, uint8_quantizer
from tritonq.nn.clip import Clip, Clipping
from tritonq.prepare.forwards.edited import set_inner_forward


def absorb_clips(model: nn.Module, names: dict[Quantizer, str]) -> dict[Quantizer, TracedQuantizer]:
    """Let the layer before each clip round its result and limit the codes; a clip without such a layer does both.

    The layer before a clip is the one whose ``quantizer_behind_clip`` is the clip's quantizer. The clip behind a layer
    then returns its input, and the layer's ReLU, if it has one, is part of the limits. A clip stays as it is if no
    quantizer rounds its result, or one per channel or of a float format.

    Args:
        model: a copy of the converted model; changed in place.
        names: by quantizer its name in the model, such as ``"2.activation_post_process"``; of all quantizers. The
            quantizer that replaces it gets the same name; the dict is not changed.

    Returns:
        By the quantizer of each clip that was changed the one that replaces it. Its codes are uint8, whatever the type.
        Code 0 is the type's smallest code; for a clip that is a ReLU with a quantizer of its own, whose type fixes the
        zero point, it is the code of the value 0.

    Raises:
        ValueError: a clip's codes do not fit uint8.
    """
    layers = {
        layer.output_quantizer: layer
        for layer in model.modules()
        if isinstance(layer, QuantizedLayer) and layer.quantizer_behind_clip is not None
    }
    forms: dict[Quantizer, TracedQuantizer] = {}
    for clip in [module for module in model.modules() if isinstance(module, Clip)]:
        output = clip.output_quantizer
        if not isinstance(output, Quantizer) or output.qtype.axis is not None:
            continue
        layer, bounds = layers.get(output), clip.clipping
        if layer is not None and layer.ceiling is not None:
            bounds = Clipping(0.0, layer.ceiling).then(bounds)
            layer.ceiling = None
        runs_in_integers = clip.input_quantizer is not None or (layer is not None and layer.multiplier is not None)
        form = forms[output] = uint8_quantizer(
            output,
            names[output],
            (bounds.low, bounds.high),
            exact=not runs_in_integers,
            # As joins count its codes: `tritonq.nn.output_quantizer.ends_in_relu` asks who owns the quantizer.
            from_zero=clip.activation_post_process is output and clip.ceiling is not None,
        )
        if layer is None:
            clip.add_module("traced_quantizer", form)
            set_inner_forward(clip, partial(_rounded, form))  # a module would become a child of that name
        else:
            layer.activation_post_process = form
            set_inner_forward(clip, unchanged)
    return forms


def _rounded(quantizer: TracedQuantizer, x: Tensor) -> Tensor:
    y: Tensor = quantizer(x)
    return y


def unchanged(x: Tensor) -> Tensor:
    """Return ``x``: the new forward of a ReLU or clip whose bounds are part of a quantizer's codes."""
    return x
