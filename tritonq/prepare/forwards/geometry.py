"""Arguments of convolutions and products that a forward calls as functions, and that a layer in their place fixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_LINEAR = ("input", "weight", "bias")
_TENSORS = len(_LINEAR)


def argument_names(function: str) -> tuple[str, ...]:
    """Return the names of a function's arguments, by position."""
    return _LINEAR if function == "linear" else _TRANSPOSED if "transpose" in function else _CONV


def geometry_of(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of a call that are neither input, weight nor bias, by name."""
    names = argument_names(function)[_TENSORS:]
    given = dict(zip(names, args[_TENSORS:], strict=False))
    return {**given, **{key: kwargs[key] for key in names if key in kwargs}}


def check_geometry(layer: nn.Module, function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where a convolution is called with another stride, padding or the like than recorded."""
    for key, value in geometry_of(function, args, kwargs).items():
        recorded = getattr(layer, key)
        numbers = value if isinstance(value, (str, tuple, list)) else (value,)
        whole = recorded if isinstance(recorded, (str, tuple)) else (recorded,)
        same = numbers == whole if isinstance(whole, str) or isinstance(numbers, str) else _broadcast(numbers, whole)
        if not same:
            raise ValueError(
                f"{function} was recorded with {key}={recorded} and is called with {value}; a quantized layer has one "
                f"{key}: prepare the model on inputs of the size that it will get, or leave the layer in float"
            )


def _broadcast(numbers: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether ``numbers``, one per axis or one for all, equal ``whole``, one per axis."""
    return tuple(numbers) == tuple(whole) or (len(numbers) == 1 and set(numbers) == set(whole))
