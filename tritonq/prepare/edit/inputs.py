"""Fake quantization of a model's inputs, before its forward runs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tritonq.prepare.record.structure import Path, replace_at


@dataclass(frozen=True)
class InputPlace:
    """Where a model receives a tensor.

    Attributes:
        key: name of its quantizer.
        position: index among the positional arguments, None if it is passed by name only.
        name: parameter name, None if it is passed by position only.
        path: keys that lead from the argument to the tensor; empty if the argument is the tensor.
    """

    key: str
    position: int | None
    name: str | None
    path: Path


class InputFakeQuants(nn.ModuleDict):
    """The quantizers of a model's inputs by parameter name, with the places of these inputs."""

    def __init__(self, places: Iterable[InputPlace], quantizers: Iterable[nn.Module]) -> None:
        self.places = tuple(places)
        super().__init__({place.key: quantizer for place, quantizer in zip(self.places, quantizers, strict=True)})

    def quantize(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with their tensors fake-quantized, whether passed by position or by name."""
        for place in self.places:
            quantizer = self[place.key]

            def change(tensor: Any, quantizer: nn.Module = quantizer) -> Any:
                is_number = isinstance(tensor, Tensor) and tensor.is_floating_point()
                return quantizer(tensor) if is_number else tensor

            if place.name is not None and place.name in kwargs:
                kwargs = {**kwargs, place.name: replace_at(kwargs[place.name], place.path, change)}
            elif place.position is not None and place.position < len(args):
                args = replace_at(args, (place.position, *place.path), change)
        return args, kwargs


def input_place(forward: Any, path: Path, taken: Iterable[str]) -> InputPlace:
    """The place of the input that ``path`` leads to: a position or parameter name first, then keys."""
    names = list(inspect.signature(forward).parameters.values())
    position: int | None = None
    name: str | None = None
    if isinstance(path[0], int):
        position = path[0]
        if position < len(names) and names[position].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            name = names[position].name
    else:
        name = path[0]
        by_name = [parameter.name for parameter in names if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        position = by_name.index(name) if name in by_name else None
    key = re.sub(r"\W", "_", "_".join(str(part) for part in (name or f"input_{position}", *path[1:])))
    while key in set(taken) or hasattr(nn.ModuleDict, key):
        key += "_"
    return InputPlace(key, position, name, path[1:])


def quantize_inputs_hook(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: fake quantize the model's inputs."""
    quantized: tuple[tuple[Any, ...], dict[str, Any]] = module.input_fake_quants.quantize(args, kwargs)  # type: ignore[operator, union-attr]
    return quantized


def quantize_first_argument_hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: fake quantize what a layer reads with its child ``input_fake_quant``."""
    return (module.input_fake_quant(args[0]), *args[1:])  # type: ignore[operator]
