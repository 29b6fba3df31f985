"""Choose the number of bits of each layer's weights under a budget, by how much their rounding disturbs the outputs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tritonq.accuracy.quantized_layers import float_outputs, inputs_of, layers_in_order, owns_weight
from tritonq.calibration import Batch, calibrate, everything_float, model_batches, rounding
from tritonq.nn.qat import QATLayer
from tritonq.prepare import prepare_qat
from tritonq.qconfig import QConfig, get_qconfig, learned_step_qconfig
from tritonq.qconfig_mapping import QConfigMapping

Unit = Literal["bytes", "bit_operations"]

# The search keeps so many choices for the layers so far; where there are more, those of like costs are thinned out.
_MOST_CHOICES = 4000

_log = logging.getLogger("tritonq")


@torch.no_grad()
def allocate_bits(
    model: nn.Module,
    data: Any,
    budget: float,
    *,
    unit: Unit = "bytes",
    widths: Sequence[int] = (2, 3, 4, 6, 8),
    activation_bits: int = 8,
    make_qconfig: Callable[[int, int], QConfig] = learned_step_qconfig,
) -> QConfigMapping:
    """Choose for each layer how many bits its weights have, under a budget of bytes or of bit operations.

    The sensitivity of layer l to width b is the noise at the model's outputs when the weights of this layer alone are
    rounded,

        ``e(l, b) = E |f(x) - f(x; FQ_b(W_l))|² / E |f(x)|²``,

    with means over all elements of the floating-point outputs f. Noises of different layers are taken to add up. Of all
    choices ``b_l`` whose costs ``Σ c(l, b_l)`` stay within the budget, the one with the least ``Σ e(l, b_l)`` is taken;
    with many layers it may be one a little above the least. c is ``weights · b / 8`` in bytes, or
    ``multiplications per sample · b · activation_bits`` in bit operations.

    Args:
        model: a float model; it is left as it is.
        data: one input tensor, or an iterable of batches, such as a data loader (labels are left out), as
            :func:`tritonq.calibrate` takes them. The first batch also gives the example inputs of
            :func:`tritonq.prepare_qat`. All of it runs once per layer and width, and twice more per width, so some
            hundred samples are enough.
        budget: the most that all counted layers together may cost, scales and biases not counted.
        unit: of ``budget``: ``"bytes"`` of weights, or ``"bit_operations"`` per sample.
        widths: numbers of bits that a layer's weights may have.
        activation_bits: bits of all activations but the model's inputs, which have 8.
        make_qconfig: called as ``make_qconfig(weight_bits, activation_bits)``; by default it makes the presets
            ``"lsq_w4a4"`` and the like.

    Returns:
        A mapping with a rule per counted layer, by its qualified name, as ``qconfig`` of :func:`tritonq.prepare_qat`
        with example inputs. Layers whose weight is computed in the forward, or handed to a function such as
        ``F.conv2d``, are not counted and get the largest width; a UserWarning names them. Embeddings and recurrent
        layers get it, too, without a warning.

    Raises:
        ValueError: no layer that can be counted; data without a batch, or neither a tensor nor iterable; no width, or
            one that is below 1 or, by the default ``make_qconfig``, above 32; an unknown unit; or a budget that the
            smallest width exceeds; or a quantizer that sees no finite value.

    Source: output noise as sensitivity: Dong et al., HAWQ-V2 (2020), whose Hessian trace it replaces; the budget as a
        knapsack: Yao et al., HAWQ-V3 (2021), section 3.4.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
        >>> weights = 3 * 8 * 9 + 8 * 8 * 9
        >>> mapping = allocate_bits(net, torch.randn(8, 3, 8, 8), budget=weights * 4 / 8)
        >>> [rule.key for rule in mapping.names]
        ['0', '2']
    """
    if unit not in ("bytes", "bit_operations"):
        raise ValueError(f"unit must be 'bytes' or 'bit_operations', got {unit!r}")
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be one or more numbers of bits, got {tuple(widths)}")
    batches = list(model_batches(model, data))
    sizes: dict[str, float] = {}
    errors: dict[str, dict[int, float]] = {}
    for width in sorted(set(widths)):
        prepared = _prepared(model, make_qconfig(width, activation_bits), batches)
        layers = layers_in_order(prepared, batches[0])
        sizes = sizes or {name: _size(prepared, layer, batches[0], unit) for name, layer in layers.items()}
        for name, error in _errors(prepared, layers, batches).items():
            errors.setdefault(name, {})[width] = error
    per_bit = 1 / 8 if unit == "bytes" else activation_bits
    _tell_of_computed_weights(prepared, max(widths))
    costs = {name: {width: sizes[name] * width * per_bit for width in errors[name]} for name in errors}
    chosen = choose_widths(costs, errors, budget)
    mapping = QConfigMapping().set_global(make_qconfig(max(widths), activation_bits)).set_input(get_qconfig())
    for name, width in chosen.items():
        mapping = mapping.set_module_name(name, make_qconfig(width, activation_bits))
    spent = sum(costs[name][width] for name, width in chosen.items())
    told = ", ".join(f"{name} {width}" for name, width in chosen.items())
    _log.info("bits of weights for %.6g of %.6g %s: %s", spent, budget, unit.replace("_", " "), told)
    return mapping


def _tell_of_computed_weights(prepared: nn.Module, width: int) -> None:
    """Give a UserWarning that names the layers of a prepared model whose weight is computed, if there are any."""
    layers = {name: module for name, module in prepared.named_modules() if isinstance(module, QATLayer)}
    computed = [name for name, layer in layers.items() if not owns_weight(layer)]
    if computed:
        # Counted from here: allocate_bits, torch.no_grad around it, and its caller.
        text = f"layers whose weight is computed in the forward are not counted, and keep {width} bits"
        warnings.warn(f"{text}: {', '.join(computed)}", stacklevel=4)


def _prepared(model: nn.Module, qconfig: QConfig, batches: Sequence[Batch]) -> nn.Module:
    args, kwargs = batches[0]
    prepared = prepare_qat(model, qconfig=qconfig, example_inputs=kwargs or args, warn=False)
    return calibrate(prepared, [kwargs or args for args, kwargs in batches]).eval()


def _size(model: nn.Module, layer: QATLayer, batch: Batch, unit: Unit) -> float:
    """Return how many weights the layer has (unit "bytes"), or its multiplications for one sample of ``batch``.

    The latter are weights · results of all its calls / out channels; ``model`` runs once.
    """
    weights = layer.weight.numel()
    if unit == "bytes":
        return weights
    results = 0
    for x in inputs_of(model, layer, [batch]):
        results += layer.linear_map(x, layer.weight).numel() // max(1, len(x))
    return weights * results / layer.linear_map.to_rows(layer.weight).shape[0]


def _errors(model: nn.Module, layers: Mapping[str, QATLayer], batches: Sequence[Batch]) -> dict[str, float]:
    """Return for each layer the noise of the model's outputs with the weights of this layer alone rounded.

    The noise is the mean square of the outputs' change, divided by their mean square.
    """
    found: dict[str, float] = {}
    with everything_float(model):
        outputs = _outputs(model, batches)
        size = sum(float(y.double().square().sum()) for y in outputs)
        for name, layer in layers.items():
            with rounding(layer.weight_fake_quant):
                noisy = _outputs(model, batches)
            noise = sum(float((a - b).double().square().sum()) for a, b in zip(noisy, outputs, strict=True))
            found[name] = noise / max(size, 1e-300)
    return found


def _outputs(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    return [tensor for batch in batches for tensor in float_outputs(model, batch)]


def choose_widths(
    costs: Mapping[str, Mapping[int, float]], errors: Mapping[str, Mapping[int, float]], budget: float
) -> dict[str, int]:
    """Return by layer a width (bits of its weights), so that the sum of errors is the least within the budget.

    Going from layer to layer, only those choices are kept which no other one beats in both cost and error. If these are
    more than 4,000, some of like cost are left out, so that the sum may lie a little above the least.

    Args:
        costs: by layer's name, the cost of each width, of at least one.
        errors: by layer's name, the error of each width in ``costs``.
        budget: the most that the chosen widths may cost together.

    Raises:
        ValueError: the cheapest widths cost more, or the budget is NaN.
    """
    least = sum(min(options.values()) for options in costs.values())
    if not least <= budget:
        raise ValueError(f"the smallest widths cost {least:.6g}, more than the budget of {budget:.6g}")
    allowed = budget * (1 + 1e-9)
    frontier: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for name, options in costs.items():
        least -= min(options.values())
        grown = sorted(
            (spent + cost, error + errors[name][width], (*so_far, width))
            for spent, error, so_far in frontier
            for width, cost in options.items()
        )
        frontier = []
        for option in grown:
            if option[0] + least <= allowed and (not frontier or option[1] < frontier[-1][1]):
                frontier.append(option)
        frontier = _thinned(frontier)
    return dict(zip(costs, frontier[-1][2], strict=True))


def _thinned(frontier: list[tuple[float, float, tuple[int, ...]]]) -> list[tuple[float, float, tuple[int, ...]]]:
    """Return at most ``_MOST_CHOICES`` of the choices ``(cost, error, widths)``, at even distances of cost.

    The cheapest and the best are among them.
    """
    if len(frontier) <= _MOST_CHOICES:
        return frontier
    least, step = frontier[0][0], (frontier[-1][0] - frontier[0][0]) / (_MOST_CHOICES - 1)
    # The dearest of each step is the best of it.
    kept = {int((option[0] - least) / step): option for option in frontier}
    return [frontier[0], *(option for option in kept.values() if option is not frontier[0])]
