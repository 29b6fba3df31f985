"""Quantized types and grids as launchers read them: the attributes of the classes in `tritonq.qparams` and `.grid`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class FloatFormat(Protocol):
    """See `tritonq.formats.FloatFormat`."""

    @property
    def mantissa_bits(self) -> int:
        """Width of the mantissa."""

    @property
    def least_exponent(self) -> int:
        """Exponent of the smallest normal number."""

    @property
    def greatest_exponent(self) -> int:
        """Exponent of the largest finite value."""

    @property
    def largest(self) -> float:
        """Largest finite value."""

    @property
    def overflow(self) -> float:
        """The number that would follow the largest."""


class BlockFormat(Protocol):
    """See `tritonq.formats.BlockFormat`."""

    @property
    def element_format(self) -> FloatFormat:
        """The elements' format."""

    @property
    def size(self) -> int:
        """Elements of a block, a power of two."""

    @property
    def scale_rounding(self) -> str:
        """``"floor"`` or ``"ceil"``."""


class QuantizedType(Protocol):
    """See `tritonq.quantized_type.QuantizedType`."""

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
    def symmetric(self) -> bool:
        """Whether the type fixes the zero point."""

    @property
    def fixed_zero_point(self) -> int | None:
        """The zero point that the type fixes, or None."""

    @property
    def rounding(self) -> str:
        """``"half_even"`` or ``"half_away"``."""

    @property
    def float_format(self) -> FloatFormat | None:
        """The format of float codes; None where codes are integers."""


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

    def with_buffers(self, scale: Tensor, zero_point: Tensor | None, enabled: Tensor | None) -> Grid:
        """Return a grid of the same type with other tensors."""

    def with_scale(self, scale: Tensor) -> Grid:
        """Return the grid with another scale."""


class Function(Protocol):
    """See `tritonq.reference.functions.Function`."""

    @property
    def name(self) -> str:
        """Which function."""

    @property
    def arguments(self) -> tuple[float, ...]:
        """Numbers that it takes beside the tensor, at most two."""


class Granularity(Protocol):
    """See `tritonq.granularity.Granularity`."""

    @property
    def axis(self) -> int | None:
        """Axis that ranges run along, or None."""


class RangeStatistics(Protocol):
    """See `tritonq.grid.RangeStatistics`."""

    @property
    def min_val(self) -> Tensor:
        """float32: 0-d or (channels,)."""

    @property
    def max_val(self) -> Tensor:
        """Largest value observed, shaped as ``min_val``."""

    @property
    def nonfinite_count(self) -> Tensor:
        """int64, 0-d."""

    @property
    def granularity(self) -> Granularity:
        """Which elements share a range."""

    @property
    def enabled(self) -> Tensor | None:
        """One element; 0 leaves the range as it is. None: always on."""

    @property
    def frozen(self) -> bool:
        """Whether the range is only read."""

    @property
    def averaging_constant(self) -> float | None:
        """Weight of the new batch; None keeps running extremes."""

    @property
    def copy_above(self) -> float | None:
        """Growth from which on a batch's range is copied, or None."""

    @property
    def rule(self) -> str:
        """How a range becomes scale and zero point."""

    @property
    def eps(self) -> float:
        """Floor under the scale."""

    @property
    def has_data(self) -> bool:
        """Whether the host knows that something was observed."""


# What the range rule compiles to where nothing observes.
NO_RANGE: dict[str, Any] = {
    **{"QUANT_MIN": 0, "QUANT_MAX": 1, "SYMMETRIC": True, "FIXED_ZERO_POINT": 0, "RULE": "torch"},
    "COPY_ABOVE": None,
}


def grid_pointers(grid: Grid | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return scale, zero point and switch as kernels load them, without gaps; None for what there is not."""
    if grid is None:
        return None, None, None
    zero_point = grid.zero_point
    return grid.scale.contiguous(), None if zero_point is None else zero_point.contiguous(), grid.enabled


def grid_constants(grid: Grid | None) -> dict[str, Any]:
    """Return the constants of a kernel that rounds to the grid; placeholders without one.

    Raises:
        NotImplementedError: float codes, to which only the kernels of `tritonq.kernels.fake_quant` round.
    """
    if grid is None:
        return {"QUANT_MIN": 0, "QUANT_MAX": 1, "ROUNDING": "half_even"}
    if grid.qtype.float_format is not None:
        raise NotImplementedError("this kernel rounds to integer codes, got a grid of floats")
    return {"QUANT_MIN": grid.qtype.quant_min, "QUANT_MAX": grid.qtype.quant_max, "ROUNDING": grid.qtype.rounding}


def float_constants(number: FloatFormat | None) -> dict[str, Any]:
    """Return the constants of kernels that round to floats; None for each where codes are integers."""
    if number is None:
        return {"MANTISSA_BITS": None, "LEAST_EXPONENT": None, "LARGEST": None, "OVERFLOW": None}
    return {
        "MANTISSA_BITS": number.mantissa_bits,
        "LEAST_EXPONENT": number.least_exponent,
        "LARGEST": number.largest,
        "OVERFLOW": number.overflow,
    }


def switch_of(grid: Grid) -> Tensor:
    """Return the switch of a grid, for kernels that need one."""
    return torch.ones(1, dtype=torch.uint8, device=grid.scale.device) if grid.enabled is None else grid.enabled


def observing_switch(statistics: RangeStatistics | None) -> Tensor | None:
    """Return the switch of a range that kernels update; None where they don't."""
    if statistics is None or statistics.frozen:
        return None
    if statistics.enabled is None:
        return torch.ones(1, dtype=torch.uint8, device=statistics.min_val.device)
    return statistics.enabled


def has_data(statistics: RangeStatistics | None) -> bool:
    """Whether a grid is known to rest on observed values; if not, its range tells."""
    return statistics is None or statistics.has_data


def range_constants(grid: Grid | None, statistics: RangeStatistics | None) -> dict[str, Any]:
    """Return what the range rule compiles to; placeholders where nothing is observed."""
    if grid is None or statistics is None or statistics.frozen:
        return NO_RANGE
    qtype = grid.qtype
    return {
        "QUANT_MIN": qtype.quant_min,
        "QUANT_MAX": qtype.quant_max,
        "SYMMETRIC": qtype.symmetric,
        # MegEngine's symmetric types all use 0.
        "FIXED_ZERO_POINT": 0 if qtype.symmetric and statistics.rule == "megengine" else qtype.fixed_zero_point,
        "RULE": statistics.rule,
        "COPY_ABOVE": statistics.copy_above,
    }
