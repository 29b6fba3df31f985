"""What launchers read of quantized types and grids: protocols with attributes of tritonq's classes of these names.

Kernels import nothing of tritonq, so they can't name those classes.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class FloatFormat(Protocol):
    """What kernels read of a small float format, :class:`tritonq.formats.FloatFormat`."""

    @property
    def mantissa_bits(self) -> int:
        """Number of mantissa bits, without the implicit one; 3 for E4M3."""

    @property
    def least_exponent(self) -> int:
        """Exponent e of the smallest normal number, ``2^e``: -6 for E4M3."""

    @property
    def greatest_exponent(self) -> int:
        """Exponent e of the largest finite value, ``2^e · f`` with ``1 <= f < 2``: 8 for E4M3, whose largest is 448."""

    @property
    def largest(self) -> float:
        """Largest finite value."""

    @property
    def overflow(self) -> float:
        """Number that would follow the largest, 480 for E4M3; magnitudes that round to it or above block gradients."""


class BlockFormat(Protocol):
    """What kernels read of a format of blocks with a scale each, :class:`tritonq.formats.BlockFormat`."""

    @property
    def element_format(self) -> FloatFormat:
        """Float format of the elements."""

    @property
    def size(self) -> int:
        """Elements of a block, a power of two."""

    @property
    def scale_rounding(self) -> str:
        """How a power-of-two scale is chosen, ``"floor"`` or ``"ceil"``.

        With ``"floor"`` a block's largest element, divided by the scale, has the greatest exponent of
        ``element_format``, and may saturate. With ``"ceil"`` the scale is twice as large in blocks where it would.
        """


class QuantizedType(Protocol):
    """What kernels read of the codes of a grid, :class:`tritonq.quantized_type.QuantizedType`."""

    @property
    def quant_min(self) -> int:
        """Smallest code; where codes are floats ``-quant_max``."""

    @property
    def quant_max(self) -> int:
        """Largest code; of floats the number of positive finite values, 126 for E4M3."""

    @property
    def axis(self) -> int | None:
        """Axis of the tensor along which scales differ, may be negative; None for one scale."""

    @property
    def symmetric(self) -> bool:
        """Whether ranges are symmetric about 0, so that the zero point is fixed."""

    @property
    def fixed_zero_point(self) -> int | None:
        """The zero point that the type fixes; None: it follows from the range."""

    @property
    def rounding(self) -> str:
        """How ties are rounded, ``"half_even"`` or ``"half_away"``.

        With the former values are multiplied by the reciprocal of the scale, with the latter divided by the scale.
        """

    @property
    def float_format(self) -> FloatFormat | None:
        """The float format of the codes; None if codes are integers."""


class Grid(Protocol):
    """What kernels read of a grid, :class:`tritonq.grid.Grid`: scale, zero point, codes and switch."""

    @property
    def scale(self) -> Tensor:
        """Scale, float32: one element, or (channels,)."""

    @property
    def zero_point(self) -> Tensor | None:
        """Zero point, int32, shaped as the scale; None stands for zero."""

    @property
    def qtype(self) -> QuantizedType:
        """The quantized type: range of codes, axis and rounding."""

    @property
    def enabled(self) -> Tensor | None:
        """The switch, one element, uint8 or bool; 0 passes values through unrounded, None is always on."""

    def with_buffers(self, scale: Tensor, zero_point: Tensor | None, enabled: Tensor | None) -> Grid:
        """Return a grid of the same type with these tensors, not copies, as scale, zero point and switch."""

    def with_scale(self, scale: Tensor) -> Grid:
        """Return a new grid with another scale; it shares the type, the zero point and the switch."""


class Function(Protocol):
    """What kernels read of a function of one tensor, :class:`tritonq.reference.functions.Function`."""

    @property
    def name(self) -> str:
        """Name of the function, one of `tritonq.kernels.pointwise.function_value`, such as ``"silu"``."""

    @property
    def arguments(self) -> tuple[float, ...]:
        """Numbers that the function takes beside the tensor, at most two; ``(0.1,)`` for a leaky ReLU of that slope."""


class Granularity(Protocol):
    """What kernels read of which elements share a range: the axis of :class:`tritonq.granularity.Granularity`."""

    @property
    def axis(self) -> int | None:
        """Axis along which ranges differ; None: one range."""


class RangeStatistics(Protocol):
    """What kernels read of an observer's running range, :class:`tritonq.grid.RangeStatistics`."""

    @property
    def min_val(self) -> Tensor:
        """Lower end of the running range, float32 of shape () or (channels,); +inf before the first batch."""

    @property
    def max_val(self) -> Tensor:
        """Upper end of the running range, float32 of shape () or (channels,); -inf before the first batch."""

    @property
    def nonfinite_count(self) -> Tensor:
        """Number of values so far that were not finite and left out, int64, 0-d; kernels add to it in place."""

    @property
    def granularity(self) -> Granularity:
        """Which elements share a range."""

    @property
    def enabled(self) -> Tensor | None:
        """The switch, one element; 0 leaves range, count and grid as they are, None is always on."""

    @property
    def frozen(self) -> bool:
        """Whether range, count and grid are only read, whatever the switch says."""

    @property
    def averaging_constant(self) -> float | None:
        """Weight of a new batch in the moving average; None keeps the extremes of all batches."""

    @property
    def copy_above(self) -> float | None:
        """Factor by which a batch's magnitude ``max(-min, max)`` must exceed the running one's to replace an average.

        A batch below 1/100 of the running magnitude replaces the average, too, unless it is all 0. None: only the first
        batch does.
        """

    @property
    def rule(self) -> str:
        """How a range becomes scale and zero point: ``"torch"``, ``"torch_v1"`` or ``"megengine"``."""

    @property
    def eps(self) -> float:
        """Smallest scale, which the rule ``"torch_v1"`` does not read."""

    @property
    def has_data(self) -> bool:
        """Whether the host found that something was observed; if False, nobody looked, and kernels read the range."""


# What the range rule compiles to where nothing observes.
NO_RANGE: dict[str, Any] = {
    **{"QUANT_MIN": 0, "QUANT_MAX": 1, "SYMMETRIC": True, "FIXED_ZERO_POINT": 0, "RULE": "torch"},
    "COPY_ABOVE": None,
}


def grid_pointers(grid: Grid | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return ``(scale, zero_point, switch)`` of a grid as contiguous tensors; None for each that it lacks.

    All are None without a grid. Kernels may only read them: one that was not contiguous is a copy.
    """
    if grid is None:
        return None, None, None
    zero_point = grid.zero_point
    return grid.scale.contiguous(), None if zero_point is None else zero_point.contiguous(), grid.enabled


def grid_constants(grid: Grid | None) -> dict[str, Any]:
    """Return QUANT_MIN, QUANT_MAX and ROUNDING, by name, of a kernel that rounds to ``grid``; placeholders without it.

    Raises:
        NotImplementedError: the grid has float codes, which only the kernels of `tritonq.kernels.fake_quant` round to.
    """
    if grid is None:
        return {"QUANT_MIN": 0, "QUANT_MAX": 1, "ROUNDING": "half_even"}
    if grid.qtype.float_format is not None:
        raise NotImplementedError("this kernel rounds to integer codes, got a grid of floats")
    return {"QUANT_MIN": grid.qtype.quant_min, "QUANT_MAX": grid.qtype.quant_max, "ROUNDING": grid.qtype.rounding}


def float_constants(number: FloatFormat | None) -> dict[str, Any]:
    """Return a float format's constants for a kernel, by name; each is None if the format is None.

    MANTISSA_BITS, without the implicit one; LEAST_EXPONENT, of the smallest normal number; LARGEST, the largest finite
    number; OVERFLOW, the number that would follow it.
    """
    if number is None:
        return {"MANTISSA_BITS": None, "LEAST_EXPONENT": None, "LARGEST": None, "OVERFLOW": None}
    return {
        "MANTISSA_BITS": number.mantissa_bits,
        "LEAST_EXPONENT": number.least_exponent,
        "LARGEST": number.largest,
        "OVERFLOW": number.overflow,
    }


def switch_of(grid: Grid) -> Tensor:
    """Return the switch of a grid; a new uint8 tensor (1,) that holds 1 if it has none, on the device of the scale."""
    return torch.ones(1, dtype=torch.uint8, device=grid.scale.device) if grid.enabled is None else grid.enabled


def observing_switch(statistics: RangeStatistics | None) -> Tensor | None:
    """Return the switch of a running range; None if nothing observes: there is no range, or it is frozen.

    For a range without a switch it is a new uint8 tensor (1,) that holds 1.
    """
    if statistics is None or statistics.frozen:
        return None
    if statistics.enabled is None:
        return torch.ones(1, dtype=torch.uint8, device=statistics.min_val.device)
    return statistics.enabled


def has_data(statistics: RangeStatistics | None) -> bool:
    """Whether ``statistics`` is None, or the host knows that the range has data; if False, kernels read the range."""
    return statistics is None or statistics.has_data


def range_constants(grid: Grid | None, statistics: RangeStatistics | None) -> dict[str, Any]:
    """Return the constants with which a kernel merges a range and computes scale and zero point from it.

    By name: QUANT_MIN and QUANT_MAX (of float codes ``-largest`` and ``largest`` of the format), SYMMETRIC,
    FIXED_ZERO_POINT (0 for all symmetric types with rule ``"megengine"``), RULE and COPY_ABOVE. If ``grid`` or
    ``statistics`` is None, or the range is frozen, nothing is observed, and they are placeholders, in the shared dict
    NO_RANGE itself, which must not be changed.
    """
    if grid is None or statistics is None or statistics.frozen:
        return NO_RANGE
    qtype = grid.qtype
    number = qtype.float_format
    smallest, largest = (qtype.quant_min, qtype.quant_max) if number is None else (-number.largest, number.largest)
    return {
        "QUANT_MIN": smallest,
        "QUANT_MAX": largest,
        "SYMMETRIC": qtype.symmetric,
        # MegEngine's symmetric types all use 0.
        "FIXED_ZERO_POINT": 0 if qtype.symmetric and statistics.rule == "megengine" else qtype.fixed_zero_point,
        "RULE": statistics.rule,
        "COPY_ABOVE": statistics.copy_above,
    }
