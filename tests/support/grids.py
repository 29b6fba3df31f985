"""Grids for tests of operators, from the numbers that the tests are written in."""

from __future__ import annotations

from torch import Tensor

from tritonq.grid import Grid
from tritonq.qparams import QuantizedType, Rounding


def grid_of(
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    rounding: Rounding = "half_even",
    enabled: Tensor | None = None,
) -> Grid:
    """Return the affine grid of these codes."""
    return Grid(scale, zero_point, QuantizedType(quant_min, quant_max, False, axis, rounding), enabled)
