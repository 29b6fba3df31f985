"""Checks of arguments of public functions. Code inside the package does not check again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonq.arithmetic import real_number, whole_number
from tritonq.qparams import is_readable

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The largest number, and the one up to which numbers round to 0.
_LARGEST, _ROUNDED_TO_ZERO = torch.finfo(torch.float32).max, 2.0**-150
_INT_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_float_tensor(name: str, x: object) -> Tensor:
    """Return ``x``, the argument called ``name``, if it is a float tensor.

    Raises:
        TypeError: it is no tensor, or not float32, float16, bfloat16 or float64.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    return x


def check_axis(x: Tensor, axis: int) -> int:
    """Return the index ``axis`` of an axis of ``x`` counted from the front: ``-1`` gives 3 if ``x`` has four axes.

    Raises:
        TypeError: ``axis`` is no int of Python or NumPy, or is a bool.
        ValueError: ``x`` has no such axis, as a tensor without axes has none.
    """
    whole = whole_number(axis)
    if whole is None:
        raise TypeError(f"axis must be an int, got {axis!r}")
    if not -x.dim() <= whole < x.dim():
        raise ValueError(f"axis {axis} is out of range for a tensor of {x.dim()} dimensions {tuple(x.shape)}")
    return whole % x.dim()


def check_scale(scale: float | Tensor, x: Tensor, channels: int | None, name: str = "scale") -> Tensor:
    """Return ``scale`` as a float32 tensor on ``x``'s device: 0-d for a number, else of ``scale``'s own shape.

    A float32 tensor is returned itself. Values of numbers are checked, those of tensors only on a CPU and not while
    ``torch.compile`` traces.

    Args:
        scale: a number of Python or NumPy (a bool is none), or a tensor of a floating point dtype on ``x``'s device.
        x: the tensor that is to be rounded.
        channels: ``scale`` must have the shape ``(channels,)`` if it is a tensor; None: one element, in any shape.
        name: what messages call it.

    Raises:
        TypeError: neither a number nor a floating point tensor.
        ValueError: wrong shape or device, or a value that float32 holds as 0 or infinity, is NaN or negative.
    """
    if not isinstance(scale, Tensor):
        number = real_number(scale)
        if number is None:
            raise TypeError(f"{name} must be a float or a tensor, got {type(scale).__name__}")
        if not _ROUNDED_TO_ZERO < number <= _LARGEST:
            raise ValueError(f"{name} must be positive and finite in float32, got {scale}")
        return torch.full((), number, dtype=torch.float32, device=x.device)
    if not scale.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {scale.dtype}")
    _check_shape_and_device(name, scale, x, channels)
    held = scale.to(torch.float32)
    if is_readable(held) and held.numel():
        least, greatest = _extremes(held)
        if not 0 < least <= greatest < math.inf:
            shown = scale.detach().flatten()[:8].tolist()
            raise ValueError(f"{name} must be positive and finite in float32, got {shown}")
    return held


def check_zero_point(
    zero_point: int | Tensor, x: Tensor, channels: int | None, quant_min: int, quant_max: int
) -> Tensor | None:
    """Return ``zero_point`` as an int32 tensor on ``x``'s device, or None if it is known to be 0.

    An int becomes a 0-d tensor, whatever ``channels`` is; an int32 tensor is returned itself. Values of ints are
    checked, those of tensors only on a CPU and not while ``torch.compile`` traces.

    Args:
        zero_point: an int, or a tensor of int8, uint8, int16, int32 or int64 on ``x``'s device.
        x: the tensor that is to be rounded.
        channels: ``zero_point`` must have the shape ``(channels,)`` if it is a tensor; None: one element, in any shape.
        quant_min: smallest code.
        quant_max: largest code.

    Raises:
        TypeError: neither an int (a bool is none) nor a tensor of one of these dtypes.
        ValueError: wrong shape or device, or a value outside of ``quant_min .. quant_max``.
    """
    if not isinstance(zero_point, Tensor):
        if whole_number(zero_point) is None:
            raise TypeError(f"zero_point must be an int or an integer tensor, got {zero_point!r}")
        if not quant_min <= zero_point <= quant_max:
            raise ValueError(f"zero_point must be in {quant_min}..{quant_max}, got {zero_point}")
        return torch.full((), zero_point, dtype=torch.int32, device=x.device) if zero_point else None
    if zero_point.dtype not in _INT_DTYPES:
        raise TypeError(f"zero_point must be an integer tensor, got {zero_point.dtype}")
    _check_shape_and_device("zero_point", zero_point, x, channels)
    if is_readable(zero_point) and zero_point.numel():
        least, greatest = _extremes(zero_point)
        if least < quant_min or greatest > quant_max:
            raise ValueError(f"zero_point must be in {quant_min}..{quant_max}, got {zero_point.flatten()[:8].tolist()}")
        if least == 0 == greatest:
            return None
    return zero_point.to(torch.int32)


def _extremes(values: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value as floats; NaN, twice, if a value is NaN."""
    values = values.detach()
    if values.numel() == 1:
        return float(values), float(values)
    least, greatest = torch.aminmax(values)
    return float(least), float(greatest)


def _check_shape_and_device(name: str, value: Tensor, x: Tensor, channels: int | None) -> None:
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, the input on {x.device}")
    if channels is None:
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
    elif tuple(value.shape) != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), got {tuple(value.shape)}")
