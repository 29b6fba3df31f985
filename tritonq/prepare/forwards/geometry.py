"""Compare a function's stride, padding and the like (its *geometry*) with those of the layer that takes its place.

The functions are convolutions and ``F.linear`` in forwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_LINEAR = ("input", "weight", "bias")
_TENSORS = len(_LINEAR)


def argument_names(function: str) -> tuple[str, ...]:
    """Return the names of all arguments of a function, by position: ``("input", "weight", "bias")`` for "linear".

    ``function`` is "linear", or a convolution such as "conv1d" or "conv_transpose3d".
    """
    return _LINEAR if function == "linear" else _TRANSPOSED if "transpose" in function else _CONV


def geometry_of(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of a call that are neither input, weight nor bias, by name; only those that were given.

    ``geometry_of("conv2d", (x, w, None, 2), {"groups": 4})`` gives ``{"stride": 2, "groups": 4}``.
    """
    names = argument_names(function)[_TENSORS:]
    given = dict(zip(names, args[_TENSORS:], strict=False))
    return {**given, **{key: kwargs[key] for key in names if key in kwargs}}


def check_geometry(layer: nn.Module, function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that a function is called with the stride, padding and so on that the layer in its place has.

    Only arguments that the call gives are compared; one number stands for all axes.

    Args:
        layer: the layer, which has these as attributes.
        function: plain name of the function, such as "conv2d".
        args: positional arguments of the call.
        kwargs: named arguments of the call.

    Raises:
        ValueError: one of them differs.
    """
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
    """Whether ``numbers``, one per axis or one for all axes, equal ``whole``, which has one per axis."""
    return tuple(numbers) == tuple(whole) or (len(numbers) == 1 and set(numbers) == set(whole))
