"""Measuring what quantization costs: per tensor its noise and clipping, per layer the error that it alone causes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tritonq.calibration import _everything_float
from tritonq.cli.evaluation import accuracy, logits
from tritonq.fake_quantize import FakeQuantizeBase
from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize
from tritonq.nn import Embedding, EmbeddingBag, QATLayer
from tritonq.report.summary import ModelSummary, describe_grid, summary

Role = Literal["input", "weight", "output"]
_ROLES: dict[str, Role] = {
    "weight_fake_quant": "weight",
    "activation_post_process": "output",
    "input_fake_quant": "input",
}
# Bins over the codes of a grid, and on each side of it again half as many; what is farther out counts in the end bins.
BINS = 256
MARGIN = 128


@dataclass(frozen=True)
class TensorMeasure:
    """One quantizer, against the tensor that it rounds as the float model has it.

    Attributes:
        role: what it quantizes.
        grid: its codes, in words.
        scale: smallest and largest scale.
        sqnr: 10 log10 of signal power over the power of the rounding and clipping error, in dB.
        clipped: fraction of values outside the grid.
        low: smallest value.
        high: largest value.
        quant_min: smallest code.
        quant_max: largest code.
        counts: values by code: ``MARGIN`` bins below the grid, ``BINS`` on it, ``MARGIN`` above it.
    """

    role: Role
    grid: str
    scale: tuple[float, float]
    sqnr: float
    clipped: float
    low: float
    high: float
    quant_min: int
    quant_max: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class LayerMeasure:
    """One layer.

    Attributes:
        name: qualified name.
        kind: class name.
        position: place in order of execution, from 1.
        sensitivity: norm of the output's error over the norm of the output, with this layer alone quantized.
        tensors: its quantizers.
    """

    name: str
    kind: str
    position: int
    sensitivity: float
    tensors: tuple[TensorMeasure, ...]

    def worst(self, role: Role | None = None) -> TensorMeasure | None:
        """Its noisiest tensor (of one role)."""
        found = [tensor for tensor in self.tensors if role in (None, tensor.role)]
        return min(found, key=lambda tensor: tensor.sqnr, default=None)

    @property
    def clipped(self) -> float:
        """Its largest fraction of clipped values."""
        return max((tensor.clipped for tensor in self.tensors), default=0.0)


@dataclass(frozen=True)
class ModelMeasure:
    """A model.

    Attributes:
        model: class name.
        images: how many were run.
        layers: worst first, by sensitivity.
        error: norm of the output's error over the norm of the output, all layers quantized.
        agreement: fraction of predictions that quantization does not change.
        float_accuracy: without rounding.
        quantized_accuracy: with it.
        summary: what became of every layer.
    """

    model: str
    images: int
    layers: tuple[LayerMeasure, ...]
    error: float
    agreement: float
    float_accuracy: float
    quantized_accuracy: float
    summary: ModelSummary


@torch.no_grad()
def measure(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    sensitivity_images: int = 64,
    tick: Callable[[], object] = lambda: None,
) -> ModelMeasure:
    """Run a prepared model over images with and without rounding, and with each layer alone rounded.

    Signals are those of the float model: with all rounding off. The model's switches and modes are restored.

    Args:
        model: a prepared classifier whose quantizers have observed data.
        images: (n, channels, height, width).
        labels: (n,), for the accuracies.
        sensitivity_images: the first of them, with which each layer alone is tried.
        tick: called after each layer.

    Raises:
        ValueError: a model without fake quantizers, one of fixed point, or one that has observed nothing.
    """
    quantizers = dict(_outermost(model))
    _check(model, quantizers)
    groups: dict[str, dict[str, FakeQuantizeBase]] = {}
    for name, quantizer in quantizers.items():
        owner, role = _owner(name)
        groups.setdefault(owner, {})[role] = quantizer
    switches = {q: q.fake_quant_enabled.clone() for q in quantizers.values()}
    modules = dict(model.named_modules())
    with _everything_float(model):
        tallies, order = _activations(model, quantizers, images)
        order += [owner for owner in groups if owner not in order]
        expected = logits(model, images)
        few, wanted = images[:sensitivity_images], expected[:sensitivity_images]
        layers = []
        for owner, parts in groups.items():
            with _enabled(parts.values(), switches):
                sensitivity = _relative(logits(model, few), wanted)
            tensors = [
                _weight(modules[owner], quantizer) if role == "weight" else tallies[quantizer].measure(role)  # type: ignore[arg-type]
                for role, quantizer in parts.items()
                if role == "weight" or quantizer in tallies
            ]
            layers.append(
                (order.index(owner), owner, sensitivity, tuple(sorted(tensors, key=lambda t: _ORDER.index(t.role))))
            )
            tick()
        with _enabled(quantizers.values(), switches):
            found = logits(model, images)
    layers.sort(key=lambda entry: entry[0])
    measured = [
        LayerMeasure(owner, _kind(owner, modules), place, sensitivity, tensors)
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
    )


_ORDER: tuple[Role, ...] = ("input", "weight", "output")


class _Tally:
    """Sums over the batches of one quantizer's tensor."""

    def __init__(self, quantizer: FakeQuantizeBase) -> None:
        self._quantizer = quantizer
        qtype = quantizer.qtype
        self._codes = qtype.quant_max - qtype.quant_min + 1
        self._signal = self._noise = 0.0
        self._clipped = self._count = 0
        self._low, self._high = math.inf, -math.inf
        self._counts = torch.zeros(BINS + 2 * MARGIN, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Count a batch, as the quantizer would round it."""
        quantizer, qtype = self._quantizer, self._quantizer.qtype
        quantizer.enable_fake_quant()
        rounded = quantizer.forward(x)
        quantizer.disable_fake_quant()
        finite = torch.isfinite(x)
        values = x[finite].double()
        if not values.numel():
            return
        self._signal += float(values.square().sum())
        self._noise += float((rounded[finite].double() - values).square().sum())
        scale, zero_point = quantizer.calculate_qparams()
        if qtype.axis is not None:
            shape = [1] * x.dim()
            shape[qtype.axis] = -1
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        codes = (x.float() / scale + zero_point)[finite]
        self._clipped += int(((codes < qtype.quant_min - 0.5) | (codes > qtype.quant_max + 0.5)).sum())
        self._count += codes.numel()
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        bins = ((codes - qtype.quant_min + 0.5) * (BINS / self._codes)).floor_().add_(MARGIN)
        bins = bins.clamp_(0, BINS + 2 * MARGIN - 1).long()
        self._counts += torch.bincount(bins.cpu(), minlength=BINS + 2 * MARGIN)

    def measure(self, role: Role) -> TensorMeasure:
        """What was counted."""
        scale, qtype = self._quantizer.calculate_qparams().scale, self._quantizer.qtype
        return TensorMeasure(
            role=role,
            grid=describe_grid(qtype),
            scale=(float(scale.min()), float(scale.max())),
            sqnr=_decibel(self._signal, self._noise),
            clipped=self._clipped / max(self._count, 1),
            low=self._low,
            high=self._high,
            quant_min=qtype.quant_min,
            quant_max=qtype.quant_max,
            counts=tuple(self._counts.tolist()),
        )


def _activations(
    model: nn.Module, quantizers: dict[str, FakeQuantizeBase], images: Tensor
) -> tuple[dict[FakeQuantizeBase, _Tally], list[str]]:
    """A tally of every activation quantizer that runs, and the owners of quantizers in order of their first results."""
    tallies: dict[FakeQuantizeBase, _Tally] = {}
    order: dict[str, None] = {}

    def watch(module: Any, args: tuple[Any, ...]) -> None:
        if module not in tallies:
            tallies[module] = _Tally(module)
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


def _weight(layer: nn.Module, quantizer: FakeQuantizeBase) -> TensorMeasure:
    """A layer's weight, with its BatchNorm folded in."""
    rows = layer.to_rows(layer.folded_parameters()[0]) if isinstance(layer, QATLayer) else layer.weight
    tally = _Tally(quantizer)
    tally.add(rows.detach())  # type: ignore[operator, union-attr]
    return tally.measure("weight")


def _outermost(model: nn.Module) -> Iterator[tuple[str, FakeQuantizeBase]]:
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizeBase) and not any(name.startswith(f"{outer}.") for outer in inside):
            inside.append(name)
            yield name, module


def _check(model: nn.Module, quantizers: dict[str, FakeQuantizeBase]) -> None:
    if not quantizers:
        raise ValueError(f"{type(model).__name__} has no fake quantizer: call prepare_qat first")
    for name, quantizer in quantizers.items():
        if isinstance(quantizer, FixedPointFakeQuantize):
            raise ValueError(f"{name!r} is of fixed point, whose layers can't be quantized one at a time")
    if not any(quantizer.is_active() for quantizer in quantizers.values()):
        raise ValueError("no quantizer has observed anything: train the model, load a checkpoint or calibrate it")


def _owner(name: str) -> tuple[str, Role]:
    """The layer that a quantizer belongs to, and what it quantizes there."""
    parent, _, child = name.rpartition(".")
    return (parent, _ROLES[child]) if child in _ROLES else (name, "output")


def _kind(owner: str, modules: dict[str, nn.Module]) -> str:
    module = modules[owner]
    if isinstance(module, (QATLayer, Embedding, EmbeddingBag)) or not isinstance(module, FakeQuantizeBase):
        return type(module).__name__
    return "model input" if owner.startswith("input_fake_quants.") else "tensor"


@contextmanager
def _enabled(quantizers: Any, switches: dict[FakeQuantizeBase, Tensor]) -> Iterator[None]:
    """These quantizers round, unless they were switched off in the model."""
    chosen = [quantizer for quantizer in quantizers if bool(switches[quantizer])]
    for quantizer in chosen:
        quantizer.enable_fake_quant()
    try:
        yield
    finally:
        for quantizer in chosen:
            quantizer.disable_fake_quant()


def _relative(found: Tensor, expected: Tensor) -> float:
    norm = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / norm if norm else 0.0


def _decibel(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
