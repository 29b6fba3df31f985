"""The quantized tensors' types as launchers read them: `tritonq.grid` holds the classes that have these attributes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class QuantizedType(Protocol):
    """See `tritonq.qparams.QuantizedType`."""

    quant_min: int
    quant_max: int
    axis: int | None
    rounding: str


class Grid(Protocol):
    """See `tritonq.grid.Grid`."""

    scale: Tensor
    zero_point: Tensor | None
    qtype: QuantizedType
    enabled: Tensor | None


def grid_pointers(grid: Grid) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return scale, zero point and switch as kernels load them: without gaps."""
    zero_point = grid.zero_point
    return grid.scale.contiguous(), None if zero_point is None else zero_point.contiguous(), grid.enabled
