"""Measure what quantization costs: noise and clipping of each tensor, and the error that each layer alone causes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonq.calibration import everything_float
from tritonq.cli.classification import accuracy, logits
from tritonq.fake_quantize import FakeQuantize
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize
from tritonq.nn import QATLayer
from tritonq.nn.fixed_point_layer import FixedPointLayer
from tritonq.nn.recurrent_forward import WEIGHT_QUANTIZER, is_weight_quantizer
from tritonq.qparams import QParams
from tritonq.report.summary import ModelSummary, summary
from tritonq.report.tally import FixedPointTally, Role, Tally, TensorMeasure

_ROLES: dict[str, Role] = {
    "weight_fake_quant": "weight",
    "activation_post_process": "output",
    "input_fake_quant": "input",
    "input_format": "input",
}


@dataclass(frozen=True)
class LayerMeasure:
    """What was measured of one layer.

    Attributes:
        name: qualified name of the layer.
        kind: its class name in the prepared model, such as ``"ConvReLU2d"``; "tensor" for a quantizer of no layer.
        position: its place in order of execution, from 1.
        sensitivity: norm of the error of the model's output over the norm of that output, with this layer alone
            quantized.
        tensors: a measure for each of its quantizers that is run: input, weight, output, in this order.
        has_float_form: whether a qconfig of None leaves it in float; not so in a fixed-point network.
        unclipped: its sensitivity with ranges that hold every value; None: not tried, as for all but the layer with
            the largest sensitivity, and for that one if it has no clipped values or no range that can be widened.
    """

    name: str
    kind: str
    position: int
    sensitivity: float
    tensors: tuple[TensorMeasure, ...]
    has_float_form: bool = True
    unclipped: float | None = None

    def worst(self, role: Role | None = None) -> TensorMeasure | None:
        """Return the measure of the layer's tensor that rounding disturbs most: the one with the lowest SQNR.

        SQNR is the ratio of signal to rounding and clipping error, in dB. Only tensors of the given ``role`` count
        ("weight", "output", "input"; None: all). None is returned if the layer rounds no such tensor.
        """
        found = [tensor for tensor in self.tensors if role in (None, tensor.role)]
        return min(found, key=lambda tensor: tensor.sqnr, default=None)

    @property
    def clipped(self) -> float:
        """The fraction of clipped values in the layer's tensor that has the most of them; 0 without tensors."""
        return max((tensor.clipped for tensor in self.tensors), default=0.0)


@dataclass(frozen=True)
class ModelMeasure:
    """What was measured of a model.

    Attributes:
        model: class name.
        images: how many images were run.
        layers: worst first, by sensitivity.
        error: norm of the output's error over the norm of the output, all layers quantized.
        agreement: fraction of predictions that quantization does not change.
        float_accuracy: fraction of images classified correctly without rounding.
        quantized_accuracy: the same fraction with rounding.
        summary: what became of every layer, as `tritonq.summary` returns it.
        error_without_worst: the error with the first of the layers in float and all others quantized.
    """

    model: str
    images: int
    layers: tuple[LayerMeasure, ...]
    error: float
    agreement: float
    float_accuracy: float
    quantized_accuracy: float
    summary: ModelSummary
    error_without_worst: float = 0.0


@torch.no_grad()
def measure(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    sensitivity_images: int = 64,
    tick: Callable[[int, int], object] = lambda done, total: None,
) -> ModelMeasure:
    """Run a prepared model over images with and without rounding, and with each layer alone rounded.

    The worst layer is the one whose rounding alone changes the model's output most. Two more things are measured: the
    error that this layer alone causes with ranges that clip nothing, and the model's error with this layer in float.

    Signals are those of the float model: with all rounding off. A fixed-point network then still clips to its formats,
    and what a fixed-point layer reads is measured divided by its η. The model's switches and modes are restored.

    Args:
        model: a prepared classifier whose quantizers have observed data.
        images: (n, channels, height, width), n at least 1.
        labels: (n,), for the accuracies.
        sensitivity_images: each layer alone is tried with so many of the images, the first ones; at least 1.
        tick: called after each layer with two numbers: how many layers are done, and how many there are.

    Returns:
        A :class:`ModelMeasure`: accuracies and errors of the model, and a measure for each layer, worst first.

    Raises:
        ValueError: no fake quantizers, none that is switched on and has observed data, or one of fixed point in
            another phase than "fixed" (:func:`tritonq.set_fixed_point_phase`).
    """
    quantizers = dict(_outermost(model))
    _check(model, quantizers)
    groups: dict[str, dict[Role, FakeQuantizeBase]] = {}
    for name, quantizer in quantizers.items():
        owner, role = _owner(name)
        groups.setdefault(owner, {})[role] = quantizer
    switches = {q: q.fake_quant_enabled.clone() for q in quantizers.values()}
    modules = dict(model.named_modules())
    with _nothing_rounded(model):
        tallies, order = _activations(model, quantizers, images)
        order += [owner for owner in groups if owner not in order]
        expected = logits(model, images)
        few, wanted = images[:sensitivity_images], expected[:sensitivity_images]
        layers = []
        for owner, parts in groups.items():
            with _enabled(parts.values(), switches):
                sensitivity = _relative(logits(model, few), wanted)
            if "weight" in parts:
                tallies[parts["weight"]] = _weight(owner, modules, parts["weight"])
            tensors = [tallies[quantizer].measure(role) for role, quantizer in parts.items() if quantizer in tallies]
            layers.append(
                (order.index(owner), owner, sensitivity, tuple(sorted(tensors, key=lambda t: _ORDER.index(t.role))))
            )
            tick(len(layers), len(groups))
        worst = max(layers, key=lambda entry: entry[2])[1]
        with _enabled(groups[worst].values(), switches), _nothing_clipped(groups[worst].values(), tallies) as tried:
            unclipped = _relative(logits(model, few), wanted) if tried else None
        with _enabled([q for q in quantizers.values() if q not in groups[worst].values()], switches):
            error_without_worst = _relative(logits(model, images), expected)
        with _enabled(quantizers.values(), switches):
            found = logits(model, images)
    layers.sort(key=lambda entry: entry[0])
    measured = [
        LayerMeasure(
            owner,
            _kind(owner, modules),
            place,
            sensitivity,
            tensors,
            not _is_fixed_point(groups[owner]),
            unclipped if owner == worst else None,
        )
        for place, (_, owner, sensitivity, tensors) in enumerate(layers, 1)
    ]
    return ModelMeasure(
        model=type(model).__name__,
        images=len(images),
        layers=tuple(sorted(measured, key=lambda layer: -layer.sensitivity)),
        error=_relative(found, expected),
        agreement=float((found.argmax(1) == expected.argmax(1)).float().mean()),
        float_accuracy=accuracy(expected, labels),
        quantized_accuracy=accuracy(found, labels),
        summary=summary(model),
        error_without_worst=error_without_worst,
    )


_ORDER: tuple[Role, ...] = ("input", "weight", "output")


def _activations(
    model: nn.Module, quantizers: dict[str, FakeQuantizeBase], images: Tensor
) -> tuple[dict[FakeQuantizeBase, Tally], list[str]]:
    """Run images; return sums over what each activation quantizer reads, and layers' names in order of execution."""
    tallies: dict[FakeQuantizeBase, Tally] = {}
    order: dict[str, None] = {}

    def watch(module: Any, args: tuple[Any, ...]) -> None:
        if module not in tallies:
            tallies[module] = FixedPointTally(module) if isinstance(module, FixedPointFakeQuantize) else Tally(module)
        tallies[module].add(args[0].detach())

    handles = [
        quantizer.register_forward_pre_hook(watch)
        for name, quantizer in quantizers.items()
        if _owner(name)[1] != "weight"
    ]
    for owner in {_owner(name)[0] for name in quantizers}:
        handles.append(
            model.get_submodule(owner).register_forward_hook(lambda *_, owner=owner: order.setdefault(owner))
        )
    try:
        logits(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return tallies, list(order)


def _weight(owner: str, modules: dict[str, nn.Module], quantizer: FakeQuantizeBase) -> Tally:
    """Return sums over the weight that ``quantizer`` rounds, multiplied by its BatchNorm's factors.

    Args:
        owner: name of the layer; for a recurrent layer the name of the quantizer.
        modules: all modules of the model, by name.
        quantizer: the weight's.
    """
    tally, layer = Tally(quantizer), modules[owner]
    if layer is quantizer:
        parent, _, name = owner.rpartition(".")
        rows = cast(Tensor, getattr(modules[parent], name.removesuffix(WEIGHT_QUANTIZER)))
    elif isinstance(layer, FixedPointLayer):
        rows, weight_format = layer.effective_parameters()[0], layer.weight_fake_quant
        tally = FixedPointTally(weight_format, weight_format.choose(rows))
    elif isinstance(layer, QATLayer):
        rows = layer.linear_map.to_rows(layer.weight_to_quantize())
    else:
        rows = cast(Tensor, layer.weight)
    tally.add(rows.detach())
    return tally


def _outermost(model: nn.Module) -> Iterator[tuple[str, FakeQuantizeBase]]:
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizeBase) and not any(name.startswith(f"{outer}.") for outer in inside):
            inside.append(name)
            yield name, module


def _check(model: nn.Module, quantizers: dict[str, FakeQuantizeBase]) -> None:
    if not quantizers:
        name = type(model).__name__
        raise ValueError(f"{name} has no fake quantizer of integers, which are measured: call prepare_qat first")
    for name, quantizer in quantizers.items():
        if isinstance(quantizer, FixedPointFakeQuantize) and quantizer.phase != "fixed":
            raise ValueError(f"{name!r} is in phase {quantizer.phase!r}: set_fixed_point_phase(model, 'fixed') first")
    if not any(quantizer.is_enabled_on_host() for quantizer in quantizers.values()):
        raise ValueError("no quantizer has observed anything: train the model, load a checkpoint or calibrate it")


def _owner(name: str) -> tuple[str, Role]:
    """Return the layer that the quantizer called ``name`` belongs to, and its role: ``("conv1", "weight")``.

    One that stands alone is its own layer, with the role "output".
    """
    parent, _, child = name.rpartition(".")
    if is_weight_quantizer(name) and child not in _ROLES:
        return name, "weight"  # one of a recurrent layer's
    return (parent, _ROLES[child]) if child in _ROLES else (name, "output")


def _kind(owner: str, modules: dict[str, nn.Module]) -> str:
    module = modules[owner]
    return "tensor" if isinstance(module, FakeQuantizeBase) else type(module).__name__


def _is_fixed_point(parts: dict[Role, FakeQuantizeBase]) -> bool:
    return any(isinstance(quantizer, FixedPointFakeQuantize) for quantizer in parts.values())


@contextmanager
def _enabled(quantizers: Any, switches: dict[FakeQuantizeBase, Tensor]) -> Iterator[None]:
    """Let ``quantizers`` round inside the block, except those whose switch in ``switches`` is 0."""
    chosen = [quantizer for quantizer in quantizers if bool(switches[quantizer])]
    for quantizer in chosen:
        _switch(quantizer, True)
    try:
        yield
    finally:
        for quantizer in chosen:
            _switch(quantizer, False)


@contextmanager
def _nothing_clipped(
    quantizers: Iterable[FakeQuantizeBase], tallies: dict[FakeQuantizeBase, Tally]
) -> Iterator[list[FakeQuantizeBase]]:
    """Widen the ranges that clipped a value, inside the block, so that none is clipped; put them back afterwards.

    Args:
        quantizers: those to look at; one with a trained scale, or that clipped nothing, stays as it is.
        tallies: what each saw, from which follows how wide its range must be.

    Yields:
        The quantizers that were widened.
    """
    widened = []
    for quantizer in quantizers:
        tally = tallies.get(quantizer)
        if not isinstance(quantizer, FakeQuantize) or tally is None or not tally.measure("output").clipped:
            continue
        widest = tally.widest_qparams()
        if widest is not None:
            before = QParams(quantizer.scale.clone(), quantizer.zero_point.clone())
            quantizer.scale.copy_(widest.scale)
            quantizer.zero_point.copy_(widest.zero_point)
            widened.append((quantizer, before))
    try:
        yield [quantizer for quantizer, _ in widened]
    finally:
        for quantizer, before in widened:
            quantizer.scale.copy_(before.scale)
            quantizer.zero_point.copy_(before.zero_point)


@contextmanager
def _nothing_rounded(model: nn.Module) -> Iterator[None]:
    """Set eval mode and switch rounding off inside the block; restore modes and switches afterwards."""
    formats = [module for module in model.modules() if isinstance(module, FixedPointFakeQuantize)]
    switches = [quantizer.fake_quant_enabled.clone() for quantizer in formats]
    with everything_float(model):
        for quantizer, switch in zip(formats, switches, strict=True):
            quantizer.fake_quant_enabled.copy_(switch)
            _switch(quantizer, False)
        try:
            yield
        finally:
            for quantizer in formats:
                _switch(quantizer, True)


def _switch(quantizer: FakeQuantizeBase, rounds: bool) -> None:
    """Switch rounding on or off.

    A fixed-point quantizer that does not round goes on clipping: its clamp at 0 is the ReLU.
    """
    if isinstance(quantizer, FixedPointFakeQuantize):
        quantizer.phase = "fixed" if rounds else "floating"
    else:
        quantizer.enable_fake_quant(rounds)


def _relative(found: Tensor, expected: Tensor) -> float:
    norm = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / norm if norm else 0.0
