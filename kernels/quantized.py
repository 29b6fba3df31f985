"""Quantized types and grids as launchers read them: the attributes of the classes in `tritonq.qparams` and `.grid`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class QuantizedType(Protocol):
    """See `tritonq.qparams.QuantizedType`."""

    @property
    def quant_min(self) -> int: ...
    @property
    def quant_max(self) -> int: ...
    @property
    def axis(self) -> int | None: ...
    @property
    def rounding(self) -> str: ...


class Grid(Protocol):
    """See `tritonq.grid.Grid`."""

    @property
    def scale(self) -> Tensor: ...
    @property
    def zero_point(self) -> Tensor | None: ...
    @property
    def qtype(self) -> QuantizedType: ...
    @property
    def enabled(self) -> Tensor | None: ...
    def with_scale(self, scale: Tensor) -> Grid: ...


def grid_pointers(grid: Grid) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return scale, zero point and switch as kernels load them: without gaps."""
    zero_point = grid.zero_point
    return grid.scale.contiguous(), None if zero_point is None else zero_point.contiguous(), grid.enabled
