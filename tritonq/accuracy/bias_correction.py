"""Correct biases: subtract the shift that rounding gives to the mean of each layer's results."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.accuracy.quantized_layers import add_to_bias, inputs_of, layers_in_order
from tritonq.calibration import everything_float, model_batches, modes_restored
from tritonq.nn.qat import QATLayer


@torch.no_grad()
def correct_bias(model: nn.Module, data: Any) -> dict[str, Tensor]:
    """Shift each layer's bias so that its results have the mean that they have without rounding.

    Rounded weights and inputs shift the mean of a layer's results, and the shifts add up from layer to layer. Layer by
    layer, in order of execution,

        ``b += E[op(x, W)] - E[op(x_q, FQ(W))]``

    where x is what the layer reads while nothing rounds, x_q what it reads in the model as corrected so far, and the
    mean is over ``data`` and all positions, per out channel. In a layer with a BatchNorm, W is the folded weight, and β
    is changed instead of b.

    Args:
        model: a calibrated or trained model, changed in place; it runs in eval mode, and its modes are restored.
        data: one input tensor, or an iterable of batches, such as a data loader (labels are left out), as
            :func:`tritonq.calibrate` takes them; some hundred samples are enough. All batches run twice per layer.

    Returns:
        By the layer's qualified name what was added, float32 (out,), on the layer's device. A layer without a bias, or
        with a BatchNorm without β, is left out, and a UserWarning names it. Layers whose weight is computed in the
        forward, RepVGG blocks, embeddings and recurrent layers are left out without a warning.

    Raises:
        ValueError: no quantized layer with a weight of its own runs, or ``data`` has no batch, or is neither a tensor
            nor iterable.

    Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction" (2019), section 4.2,
        with means of data in place of those of BatchNorm.

    Examples:
        >>> import tritonq
        >>> x = torch.rand(64, 3, 8, 8)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> model = tritonq.calibrate(tritonq.prepare_qat(net, example_inputs=x), x)
        >>> {name: shift.shape for name, shift in tritonq.correct_bias(model, x).items()}
        {'0': torch.Size([8])}
    """
    batches = list(model_batches(model, data))
    with modes_restored(model):
        model.eval()
        layers = layers_in_order(model, batches[0])
        with everything_float(model):
            wanted = {name: _mean(layer, inputs_of(model, layer, batches), False) for name, layer in layers.items()}
        found: dict[str, Tensor] = {}
        for name, layer in layers.items():
            shift = wanted[name] - _mean(layer, inputs_of(model, layer, batches), True)
            if add_to_bias(layer, shift):
                found[name] = shift.float()
    left_out = [name or type(model).__name__ for name in layers if name not in found]
    if left_out:  # torch.no_grad puts a function between this one and its caller
        warnings.warn(f"layers without a bias can't be corrected: {', '.join(left_out)}", stacklevel=3)
    return found


def _mean(layer: QATLayer, inputs: Sequence[Tensor], rounded: bool) -> Tensor:
    """Return the mean of the layer's results per out channel, before its activation: float64 (out,).

    ``inputs`` are what the layer reads; ``rounded`` says whether its weight is rounded. Without a sample in them the
    mean is 0.
    """
    weight, bias = layer.folded_parameters()
    weight = layer.quantized_folded_weight(weight) if rounded else weight
    op, total, count = layer.linear_map, torch.zeros((), dtype=torch.float64), 0
    for x in inputs:
        y = op(x, weight, bias).movedim(op.output_axis, 0).flatten(1)
        total, count = total + y.sum(1, dtype=torch.float64), count + y.shape[1]
    return total / max(1, count)
