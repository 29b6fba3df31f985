"""AdaRound: choose for each weight whether it is rounded up or down, so that the layer's results change least.

The *rows* of a weight are all values of one out channel each: a tensor (out, ...), whatever the layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonq.accuracy.quantized_layers import (
    check_rounds_to_nearest,
    inputs_of,
    layers_in_order,
    write_folded_weight,
)
from tritonq.calibration import everything_float, model_batches, modes_restored
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.groups import aligned
from tritonq.grid import Grid
from tritonq.nn.qat import QATLayer
from tritonq.prepare.record.snapshot import copied

# The stretched sigmoid's ends, so that 0 and 1 are reached.
_LOW, _HIGH = -0.1, 1.1
# Exponent of the regularizer, at first and at last, after a share of the steps without it; its weight.
_BETA = (20.0, 2.0)
_WARM_UP = 0.2
_REGULARIZER = 0.01
# How far Adam can take a variable in all: the paper's learning rate of 1e-3 times its 10,000 steps.
_WAY = 10.0


class SoftRounding:
    """The trained variables V of one layer: ``W(V) = s (clip(floor(W/s) + h(V) + z) - z)``, rows (out, ...).

    ``s`` and ``z`` are scale and zero point of the weight's grid, ``clip`` goes to its smallest and largest code, and
    ``h(V)`` is :meth:`share`.

    Args:
        rows: the weight W, (out, ...), float.
        grid: the grid that the weight is rounded to.

    Attributes:
        variables: V, a leaf that requires a gradient, shaped as ``rows``. At first ``h(V) = W/s -
            floor(W/s)``, so that ``W(V)`` is W, clipped and not rounded.
    """

    def __init__(self, rows: Tensor, grid: Grid) -> None:
        self._scale = aligned(grid.scale.detach(), rows, grid.granularity)
        zero = torch.zeros_like(grid.scale, dtype=torch.int32) if grid.zero_point is None else grid.zero_point
        self._zero = aligned(zero, rows, grid.granularity)
        self._qtype = grid.qtype
        position = rows / self._scale
        self._floor = position.floor()
        rest = ((position - self._floor) - _LOW) / (_HIGH - _LOW)
        self.variables = torch.logit(rest).detach().requires_grad_()

    def share(self) -> Tensor:
        """Return ``h(V) = clip(sigmoid(V) (ζ - γ) + γ, 0, 1)``, how far each weight is rounded up; ζ is 1.1, γ -0.1."""
        return (torch.sigmoid(self.variables) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def weight(self, share: Tensor) -> Tensor:
        """Return rows ``s (clip(floor(W/s) + share + z) - z)``.

        ``share`` is shaped as ``variables``, each element from 0 (rounds down) to 1 (rounds up).
        """
        codes = (self._floor + share + self._zero).clamp(self._qtype.quant_min, self._qtype.quant_max)
        return (codes - self._zero) * self._scale


def adaptive_round(
    model: nn.Module, data: Any, *, steps: int = 1000, batch_size: int = 32, seed: int = 0
) -> dict[str, float]:
    """Round each layer's weights up or down so that its results are most like those without rounding (AdaRound).

    Layer by layer, in order of execution, V is trained with Adam to lessen

        ``E |f(op(x, W) + b) - f(op(x_q, W(V)) + b)|² + λ Σ (1 - |2 h(V) - 1|^β)``

    with ``W(V) = s (clip(floor(W/s) + h(V) + z) - z)`` and h a sigmoid stretched to [-0.1, 1.1] and clipped to [0, 1].
    W and b are weight and bias, with the layer's BatchNorm folded in. x is what the layer reads in the float model, x_q
    in the model with all earlier layers rounded, f the layer's ReLU, if it has one, and the mean is over samples and
    positions. λ is 0 in the first fifth of the steps, then 0.01, and β falls from 20 to 2 by a cosine: that drives h to
    0 or 1. Adam's rate is ``10 / steps``. Then each weight becomes the value it is rounded to: scales and ranges stay,
    and :func:`tritonq.convert` or training can follow.

    Args:
        model: a calibrated or trained model; its weights are changed in place, its modes are restored.
        data: one input tensor, one dict of arguments, or an iterable of batches, as :func:`tritonq.calibrate` takes
            them, on the model's device; 1,000 to 2,000 samples are usual. All batches are kept until the end, the
            inputs and results of one layer at a time.
        steps: of Adam per layer: 1,000 take seconds for a layer of a small net. The paper takes 10,000.
        batch_size: samples per step, drawn with replacement.
        seed: of that draw.

    Returns:
        By path of the layer, the mean squared error of its results after, as a share of that of rounding to the
        nearest: below 1 where this helped. A layer that it did not help keeps its weights, with 1. Layers that the
        first batch does not run, or whose weight is computed in the forward or not rounded, are left out.

    Raises:
        ValueError: no quantized layer, no batch, ``data`` that is neither a tensor nor iterable, ``steps`` or
            ``batch_size`` below 1; a weight in a float format, or one whose codes follow from a formula of the whole
            tensor (DoReFa, binary, ternary); something in the model that can't be copied; a layer that reads inputs of
            several sizes: only then have weights changed, those of earlier layers.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020), equations 21 to 25.

    Examples:
        >>> import tritonq
        >>> x = torch.rand(64, 3, 8, 8)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> mapping = tritonq.get_qconfig_mapping("lsq_w2a4")
        >>> model = tritonq.calibrate(tritonq.prepare_qat(net, qconfig=mapping, example_inputs=x), x)
        >>> ratios = tritonq.adaptive_round(model, x, steps=50)
        >>> sorted(ratios), all(ratio <= 1 for ratio in ratios.values())
        (['0', '2'], True)
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be positive, got {steps} and {batch_size}")
    batches = list(model_batches(model, data))
    generator = torch.Generator().manual_seed(seed)
    unrounded = copied(model)
    ratios: dict[str, float] = {}
    with modes_restored(model), everything_float(unrounded):
        model.eval()
        with torch.no_grad():
            layers = layers_in_order(model, batches[0])
        check_rounds_to_nearest(layers, "adaptive_round")
        for name, layer in layers.items():
            quantizer = layer.weight_fake_quant
            if not isinstance(quantizer, FakeQuantizeBase) or not quantizer.is_enabled_on_host():
                continue
            with torch.no_grad():
                weight, bias = layer.folded_parameters()
                rows = layer.linear_map.to_rows(weight)
                read = inputs_of(unrounded, cast(QATLayer, unrounded.get_submodule(name)), batches)
                _check_sizes(name, read)
                targets = torch.cat([_result(layer, x, rows, bias) for x in read])
                inputs = torch.cat(inputs_of(model, layer, batches))
            has_sample = targets.numel() > 0
            ratios[name] = _round(layer, inputs, targets, steps, batch_size, generator) if has_sample else 1.0
    return ratios


def _check_sizes(name: str, inputs: Sequence[Tensor]) -> None:
    """Raise ValueError if samples of the layer's ``inputs`` have several shapes, since they are put into one tensor."""
    shapes = {tuple(x.shape[1:]): None for x in inputs}
    if len(shapes) > 1:
        raise ValueError(
            f"adaptive_round takes inputs of one size, layer {name!r} reads {' and '.join(map(str, shapes))}"
        )


def _result(layer: QATLayer, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """Return the layer's result for ``x``, with ReLU, before its quantizer.

    ``rows`` are its folded weight, (out, ...), and ``bias`` its folded bias, (out,) or None.
    """
    op = layer.linear_map
    return layer.rectified(op(x, op.from_rows(rows), bias))


def _round(
    layer: QATLayer, inputs: Tensor, targets: Tensor, steps: int, batch_size: int, generator: torch.Generator
) -> float:
    """Train the rounding of one layer by the loss of :func:`adaptive_round`, and write it into its weight if it helps.

    Args:
        layer: the layer.
        inputs: x_q of all samples, in one tensor.
        targets: ``f(op(x, W) + b)`` of the same samples.
        steps: of Adam.
        batch_size: samples per step.
        generator: chooses them.

    Returns:
        The mean squared error after, divided by that of rounding to the nearest; 1.0 if the weight stays as it was.
    """
    with torch.no_grad():
        weight, bias = layer.folded_parameters()
        rows = layer.linear_map.to_rows(weight)
        nearest = layer.linear_map.to_rows(layer.quantized_folded_weight(weight))
    rounding = SoftRounding(rows, layer.weight_grid())
    optimizer = torch.optim.Adam([rounding.variables], lr=_WAY / steps)
    first = math.ceil(_WARM_UP * steps)
    for step in range(steps):
        chosen = torch.randint(len(inputs), (min(batch_size, len(inputs)),), generator=generator).to(inputs.device)
        share = rounding.share()
        error = _result(layer, inputs[chosen], rounding.weight(share), bias) - targets[chosen]
        loss = error.square().movedim(layer.linear_map.output_axis, 0).flatten(1).sum(0).mean()
        if step >= first:
            progress = (step - first) / max(1, steps - first)
            beta = _BETA[1] + 0.5 * (_BETA[0] - _BETA[1]) * (1 + math.cos(math.pi * progress))
            loss = loss + _REGULARIZER * (1 - (2 * share - 1).abs().pow(beta)).sum()
        (rounding.variables.grad,) = torch.autograd.grad(loss, [rounding.variables])
        optimizer.step()
    with torch.no_grad():
        chosen_rows = rounding.weight((rounding.share() >= 0.5).to(rows.dtype))
        before, after = (_error(layer, inputs, targets, found, bias, batch_size) for found in (nearest, chosen_rows))
        if not after < before:
            return 1.0
        write_folded_weight(layer, chosen_rows)
    return after / before


def _error(
    layer: QATLayer, inputs: Tensor, targets: Tensor, rows: Tensor, bias: Tensor | None, batch_size: int
) -> float:
    """Return the mean squared error of the layer's results for ``inputs`` against ``targets``, over all elements.

    ``rows`` and ``bias`` are its folded parameters; ``batch_size`` samples are computed at a time.
    """
    total = torch.zeros((), dtype=torch.float64)
    for x, wanted in zip(*(torch.split(values, batch_size) for values in (inputs, targets)), strict=True):
        total += (_result(layer, x, rows, bias) - wanted).square().sum(dtype=torch.float64).cpu()
    return float(total) / targets.numel()
