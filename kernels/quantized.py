"""Quantized types and grids as launchers read them: the attributes of the classes in `tritonq.qparams` and `.grid`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class QuantizedType(Protocol):
    """See `tritonq.qparams.QuantizedType`."""

    @property
    def quant_min(self) -> int:
        """Smallest code."""

    @property
    def quant_max(self) -> int:
        """Largest code."""

    @property
    def axis(self) -> int | None:
        """Axis that scales run along, or None."""

    @property
    def rounding(self) -> str:
        """``"half_even"`` or ``"half_away"``."""


class Grid(Protocol):
    """See `tritonq.grid.Grid`."""

    @property
    def scale(self) -> Tensor:
        """float32: one element, or (channels,)."""

    @property
    def zero_point(self) -> Tensor | None:
        """int32, as the scale; None stands for zero."""

    @property
    def qtype(self) -> QuantizedType:
        """Codes, axis and rounding."""

    @property
    def enabled(self) -> Tensor | None:
        """One element; 0 passes values through. None: always on."""

    def with_scale(self, scale: Tensor) -> Grid:
        """Return the grid with another scale."""


def grid_pointers(grid: Grid) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return scale, zero point and switch as kernels load them: without gaps."""
    zero_point = grid.zero_point
    return grid.scale.contiguous(), None if zero_point is None else zero_point.contiguous(), grid.enabled
