"""Cross-layer equalization: rescale channels, so that weights and activations of two layers have similar ranges."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.accuracy.quantized_layers import float_outputs, layers_in_order
from tritonq.calibration import Batch, everything_float, model_batches, modes_restored
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.nn.elementwise import Joint
from tritonq.nn.qat import QATLayer
from tritonq.nn.unary import UnaryLayer

# Sweeps over all pairs end when no factor is further from 1, or after so many.
_CONVERGED = 1e-3
_MOST_SWEEPS = 20
# Ratio of the largest to the smallest factor in a pair: channels of hardly any weight would lose all of it.
_MOST_SPREAD = 1e4
# Relative change of the model's outputs that rounding errors of factors may cause.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class _Pair:
    """Two layers, where only the second reads the output of the first.

    Attributes:
        names: of both.
        first: the layer whose out channels are scaled.
        second: the layer whose in channels are scaled back.
    """

    names: tuple[str, str]
    first: QATLayer
    second: QATLayer


@torch.no_grad()
def equalize(model: nn.Module, data: Any) -> dict[tuple[str, str], Tensor]:
    """Rescale channels between two layers in a row so that the ranges of their weights are alike.

    Where the result of a first layer is read by one second layer only, directly or through a plain ReLU, dividing out
    channel i of the first by s_i and multiplying the weights of the second that read it by s_i changes nothing but
    ranges. With ``r_i`` the largest absolute value of channel i in a layer's weight, BatchNorm folded in,

        ``s_i = sqrt(r_i(first) / r_i(second))``.

    Pairs are swept until no factor is further than 0.1 % from 1, at most 20 times; in a sweep the largest factor of a
    pair is at most 10^4 times the smallest. Each pair is tried on the first batch: if that changes the model's outputs,
    since something else reads the channels or moves them, the pair is left as it was. With one scale per out channel
    the gain is in activations; with one scale per tensor also in weights. Quantizers keep their ranges, which fit no
    more: :func:`tritonq.calibrate` or train afterwards.

    Args:
        model: a prepared model, calibrated or not, whose weights, biases and γ, β change in place; its modes are
            restored.
        data: one input tensor, or an iterable of batches, such as a data loader (labels are left out), as
            :func:`tritonq.calibrate` takes them; the first batch is used.

    Returns:
        By qualified names of first and second layer the factors s, float32 (channels,) on the CPU, multiplied over all
        sweeps, for pairs that were rescaled; empty without such. A pair needs a quantizer to integers between both
        layers: with weights alone quantized, or float formats, there is none.

    Raises:
        ValueError: no quantized layer with a weight of its own runs, or ``data`` has no batch, or is neither a tensor
            nor iterable.

    Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction" (2019), section 4.1.

    Examples:
        >>> import tritonq
        >>> x = torch.rand(4, 3, 8, 8)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> model = tritonq.prepare_qat(net, example_inputs=x)
        >>> {names: factors.shape for names, factors in tritonq.equalize(model, x).items()}
        {('0', '2'): torch.Size([8])}
    """
    batch = next(model_batches(model, data))
    with modes_restored(model), everything_float(model):
        model.eval()
        layers = layers_in_order(model, batch)
        expected = _outputs(model, batch)
        pairs = [pair for pair in _pairs(model, layers) if _is_alone(pair, model, batch, expected)]
        total = {pair.names: torch.ones(_out(pair.first), dtype=torch.float64) for pair in pairs}
        for _ in range(_MOST_SWEEPS):
            largest = 0.0
            for pair in pairs:
                factors = _factors(pair)
                _apply(pair, factors)
                total[pair.names] *= factors.cpu()
                largest = max(largest, float(factors.log().abs().max()))
            if largest < _CONVERGED:
                break
    return {names: factors.float() for names, factors in total.items()}


def _pairs(model: nn.Module, layers: dict[str, QATLayer]) -> list[_Pair]:
    """Return pairs of layers of which only the second reads the quantizer of the first one's result.

    Between them is a plain ReLU or nothing, channels are as many, and a BatchNorm of the first has γ and β. Whether
    nothing else reads the result is tried by :func:`_is_alone`.
    """
    makers = {layer.activation_post_process: (name, layer) for name, layer in layers.items()}
    readers: Counter[nn.Module] = Counter(
        layer.input_quantizer for layer in layers.values() if layer.input_quantizer is not None
    )
    for module in model.modules():
        if isinstance(module, (Joint, UnaryLayer)):
            read = module.input_quantizers if isinstance(module, Joint) else (module.input_quantizer,)
            readers.update(held for held in read if held is not None)
    pairs = []
    for name, layer in layers.items():
        source = layer.input_quantizer
        made = None if source is None else makers.get(source)
        if source is None or made is None or readers[source] > 1:
            continue
        if made[1].ceiling in (None, math.inf) and _takes_factors(made[1]) and _channels(layer) == _out(made[1]):
            pairs.append(_Pair((made[0], name), made[1], layer))
    return pairs


def _takes_factors(layer: QATLayer) -> bool:
    is_affine = not isinstance(layer, QATBatchNormLayer) or (layer.bn.weight is not None and layer.bn.bias is not None)
    return is_affine and type(layer).rectified is QATLayer.rectified


def _out(layer: QATLayer) -> int:
    return int(layer.linear_map.to_rows(layer.weight).shape[0])


def _channels(layer: QATLayer) -> int | None:
    """Return how many channels a layer reads; None if they are not on axis 1 of its weight."""
    if getattr(layer, "transposed", False):
        return None
    return int(layer.weight.shape[1]) * int(getattr(layer, "groups", 1))


def _is_alone(pair: _Pair, model: nn.Module, batch: Batch, expected: list[Tensor]) -> bool:
    """Whether the model's outputs stay ``expected`` when channels between the two layers are scaled by factors.

    That is so if nothing else reads these channels, and nothing between the layers mixes or moves them. Each channel
    gets another factor. The weights are put back.
    """
    # γ and β of a FrozenBatchNorm are buffers.
    held = [tensor for layer in (pair.first, pair.second) for tensor in (*layer.parameters(), *layer.buffers())]
    before = [tensor.clone() for tensor in held]
    _apply(pair, torch.linspace(0.5, 2, _out(pair.first), device=pair.first.weight.device))
    outputs = _outputs(model, batch)
    for tensor, value in zip(held, before, strict=True):
        tensor.copy_(value)
    return len(outputs) == len(expected) and all(map(_is_close, outputs, expected))


def _factors(pair: _Pair) -> Tensor:
    first = pair.first.linear_map.to_rows(pair.first.folded_parameters()[0]).flatten(1).abs().amax(1).double()
    second = _by_input(pair.second.folded_parameters()[0], pair.second).abs().amax((1, 3)).flatten().double()
    factors = torch.where((first > 0) & (second > 0), (first / second.clamp(min=1e-300)).sqrt(), 1.0)
    middle = factors.log().median().exp()
    return factors.clamp(middle / _MOST_SPREAD**0.5, middle * _MOST_SPREAD**0.5)


def _by_input(weight: Tensor, layer: QATLayer) -> Tensor:
    """Return a view (groups, out per group, in per group, taps) of a weight, taps being the positions of the kernel."""
    groups = int(getattr(layer, "groups", 1))
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _apply(pair: _Pair, factors: Tensor) -> None:
    first, second = pair.first, pair.second
    if isinstance(first, QATBatchNormLayer):
        for parameter in (first.bn.weight, first.bn.bias):
            parameter.div_(factors.to(parameter.dtype))
    else:
        rows = first.linear_map.to_rows(first.weight)
        first.weight.copy_(first.linear_map.from_rows(rows / factors.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))))
        if first.bias is not None:
            first.bias.div_(factors.to(first.bias.dtype))
    weight = _by_input(second.weight, second)
    weight.mul_(factors.to(weight.dtype).view(len(weight), 1, -1, 1))


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return copies of the floating-point tensors in the model's result, which may be parameters that change."""
    return [tensor.clone() for tensor in float_outputs(model, batch)]


def _is_close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and bool((got - expected).norm() <= _ROUNDING * expected.norm())
