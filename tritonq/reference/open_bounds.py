"""Where a quantizer's gradient passes, as two bounds: comparing with them replaces rounding in a backward pass."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from tritonq.quantized_type import Rounding

_Float: TypeAlias = "np.floating[Any]"


@lru_cache(maxsize=4096)
def open_bounds(scale: float, lowest: int, highest: int, rounding: Rounding, dtype: torch.dtype) -> tuple[float, float]:
    """Return ``(low, high)`` such that ``lowest <= round(x / scale) <= highest`` exactly if ``low < x < high``.

    The bounds are the floats just outside. They are found by stepping from an estimate, in the arithmetic that rounds
    ``x``.

    Args:
        scale: positive.
        lowest: smallest code, counted from the zero point.
        highest: largest code, counted from the zero point.
        rounding: ``"half_even"`` multiplies by the float32 reciprocal of ``scale``, ``"half_away"`` divides.
        dtype: of ``x`` and the arithmetic: float32 or float64.
    """
    kind = np.float64 if dtype == torch.float64 else np.float32
    with np.errstate(over="ignore"):
        step = kind(scale)
        low = _outermost(step, lowest, -np.inf, rounding, kind)
        high = _outermost(step, highest, np.inf, rounding, kind)
    return float(low), float(high)


def open_bounds_of_codes(quant_min: int, quant_max: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the floats just below ``quant_min`` and just above ``quant_max``: codes in range lie strictly between.

    ``dtype``, float32 or float64, is that of the codes, which are whole numbers, and of the floats.
    """
    kind = np.float64 if dtype == torch.float64 else np.float32
    return float(np.nextafter(kind(quant_min), kind(-np.inf))), float(np.nextafter(kind(quant_max), kind(np.inf)))


def _outermost(step: _Float, code: int, outwards: float, rounding: Rounding, kind: type[_Float]) -> _Float:
    """Return the first value, in the direction ``outwards`` (±inf), that rounds to a code beyond ``code``.

    Codes count from the zero point. ``step`` is the scale, ``kind`` the type of the arithmetic, that of the result.
    """
    inverse = kind(np.float32(1) / np.float32(step))

    def is_outside(x: _Float) -> bool:
        if rounding == "half_even":
            rounded = np.rint(x * inverse)
        else:
            size = np.abs(x / step)
            rounded = np.copysign(np.floor(size) + (size - np.floor(size) >= 0.5), x)
        return bool(rounded > code) if outwards > 0 else bool(rounded < code)

    half = 0.5 if outwards > 0 else -0.5
    is_product = rounding == "half_even" and 0 < inverse < np.inf
    x: _Float = kind((code + half) / float(inverse) if is_product else (code + half) * float(step))
    while not is_outside(x):
        x = np.nextafter(x, kind(outwards))
    while is_outside(inwards := np.nextafter(x, kind(-outwards))):
        x = inwards
    return x


def between(dy: Tensor, y: Tensor, low: float, high: float, out: Tensor | None = None) -> Tensor:
    """Return ``dy`` where ``low < y < high`` or ``y`` is NaN, else 0.

    Args:
        dy: gradient, in the dtype of ``y``; shaped as ``y`` or 0-d.
        y: the values that are compared.
        low: lower bound, excluded.
        high: upper bound, excluded.
        out: memory for the result, shaped as ``y``, not used in a traced graph; None: new memory.
    """
    if torch.compiler.is_compiling():
        # Compilers take the result of hardtanh_backward for laid out as dy is, while PyTorch lays it out as y is.
        return torch.where((y <= low) | (y >= high), 0, dy)
    if out is None:
        return cast(Tensor, torch.ops.aten.hardtanh_backward(dy, y, low, high))
    return cast(Tensor, torch.ops.aten.hardtanh_backward.grad_input(dy, y, low, high, grad_input=out))
