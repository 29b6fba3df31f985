"""Find adapters of low rank beside frozen layers (LoRA): two small layers that train while the layer itself does not.

``y = W x + s · B A x``, with W frozen. W becomes a quantized layer. A and B stay in float, as their authors train them;
only the sum is rounded.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; ``lora.Linear`` of peft.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from torch import nn

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.layers import Layer
from tritonq.prepare.decide.places import results
from tritonq.prepare.decide.rows import out_channels
from tritonq.prepare.record.dataflow import ValueIndex


def find_adapters(layers: Iterable[Layer], analysis: Analysis) -> dict[str, str]:
    """Return the names of the layers that are part of an adapter, each with the reason why it stays in float.

    A reason is "it belongs to an adapter of low rank beside attention.query, which is frozen".

    A reads what a frozen layer reads, and returns fewer channels than that layer reads and than it returns. B reads the
    result of A, and returns a tensor of the frozen layer's shape. Operations that only move values, such as dropout,
    may stand before A and B. Both have parameters that train. Layers that are functions are not searched.
    """
    layers = [layer for layer in layers if layer.function is None]
    frozen = [layer for layer in layers if not _trains(layer, analysis)]
    trained = [layer for layer in layers if _trains(layer, analysis)]
    by_input: dict[int, list[Layer]] = {}
    for layer in trained if frozen else ():
        for value in _inputs(layer, analysis):
            by_input.setdefault(value, []).append(layer)
    bases: dict[str, list[str]] = {}  # for each layer of an adapter, the frozen layers that it may stand beside
    for base in frozen:
        for down in (layer for value in _inputs(base, analysis) for layer in by_input.get(value, ())):
            made = results((analysis.flow.calls[index] for index in down.ends), analysis)
            for up in (layer for value in made for layer in by_input.get(value, ())):
                if _is_narrow(down, base, analysis) and _shapes(up, analysis) == _shapes(base, analysis):
                    for name in (down.name, up.name):
                        bases.setdefault(name, []).append(base.name)
    nearest = {name: max(others, key=lambda other: _shared_parts(name, other)) for name, others in bases.items()}
    return {
        name: f"it belongs to an adapter of low rank beside {base}, which is frozen" for name, base in nearest.items()
    }


def _shared_parts(name: str, other: str) -> int:
    """Return how many modules hold both of two modules, given by name."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _trains(layer: Layer, analysis: Analysis) -> bool:
    """Whether a layer has a parameter that takes gradients."""
    return any(parameter.requires_grad for parameter in analysis.modules[layer.name].parameters())


def _inputs(layer: Layer, analysis: Analysis) -> set[ValueIndex]:
    """Return indices of the values that a layer reads, before operations that only move values, such as dropout."""
    values = set()
    for index in layer.calls:
        value = analysis.flow.calls[index].inputs[0]
        while (call := analysis.flow.producer(value)) is not None and analysis.keeps_grid(call):
            value = call.inputs[0]
        values.add(value)
    return values


def _is_narrow(down: Layer, base: Layer, analysis: Analysis) -> bool:
    """Whether the layer ``down`` returns fewer channels than the layer ``base`` reads and than it returns."""
    module: nn.Module = analysis.modules[base.name]
    rank, channels = out_channels(analysis.modules[down.name]), out_channels(module)
    read = getattr(module, "in_channels", getattr(module, "in_features", None))
    return rank is not None and channels is not None and read is not None and rank < min(channels, read)


def _shapes(layer: Layer, analysis: Analysis) -> set[tuple[int, ...]]:
    """Return the shapes of the tensors that a layer returns in its calls."""
    values = results((analysis.flow.calls[index] for index in layer.calls), analysis)
    return {analysis.flow.values[value].shape for value in values}
