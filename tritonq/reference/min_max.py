"""Running ranges in PyTorch: the specification of `tritonq.kernels.min_max` and the CPU path.

A batch is *merged* into a running range as the statistics say: without averaging constant the range holds the extremes
of all batches; with averaging constant c each end m becomes ``m + c (end - m)``, and the first batch, and with
``copy_above`` one far larger or smaller than the range (:func:`update_range`), replaces it.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype, operand
from tritonq.granularity import Granularity
from tritonq.grid import Grid, RangeStatistics
from tritonq.qparams import is_readable, known_ordered, number_to_qparams, range_to_qparams
from tritonq.reference.operator import New, operator

_Number = TypeVar("_Number", np.float32, np.float64)
_NUMBERS: dict[torch.dtype, type[Any]] = {torch.float32: np.float32, torch.float64: np.float64}


def range_shape(arguments: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape of an operator's results that are ends of ranges of its argument ``x``, for ``New``.

    It is ``(x.shape[axis],)``, or ``()`` if axis is None.

    Args:
        arguments: all arguments of the operator by name; ``x`` and ``axis`` are read.

    Raises:
        TypeError: ``axis`` is neither a whole number nor None.
        ValueError: ``x`` has no such axis.
    """
    return Granularity(arguments["axis"]).scale_shape(arguments["x"].shape)


# Batches of one network differ by less than this factor in their largest value; `kernels/constants.py` has it too.
FALL = 100.0
RANGE = New(range_shape, "x", torch.float32)


@operator(returns=(RANGE, RANGE, New(lambda arguments: (), "x", torch.int64)))
def min_max(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest and the largest finite value of ``x``, and how many values are not finite.

    Args:
        x: any shape, any float dtype; may be empty.
        axis: keep one range per index of this axis; None for one range.

    Returns:
        ``(low, high, nonfinite)``: float32, float32 and int64, 0-d or (x.shape[axis],) (the count is 0-d always).
        Without a finite value ``low`` is +inf and ``high`` is -inf.
    """
    low, high, nonfinite = extremes(x, axis)
    return low, high, _zero_count(x) if nonfinite is None else nonfinite


def extremes(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the smallest and the largest finite value of ``x``, and how many are not finite, None if known to be none.

    Args:
        x: any shape, any float dtype; may be empty.
        axis: keep one range per index of this axis; None for one range.

    Returns:
        ``(low, high, nonfinite)``: float32, 0-d or (x.shape[axis],), +inf and -inf without a finite value; int64, 0-d.
        The count is None if the host knows without waiting that ``x`` is not empty and all its values are finite.
    """
    channels = () if axis is None else (x.shape[axis],)
    if x.numel() == 0:
        return x.new_full(channels, torch.inf).float(), x.new_full(channels, -torch.inf).float(), _zero_count(x)
    kept = None if axis is None else axis % x.dim()
    if kept is not None and x.dim() == 1:
        x = x.unsqueeze(1)  # an empty list of dimensions would reduce all of them
    dims = [d for d in range(x.dim()) if d != kept]
    low, high = x.amin(dims), x.amax(dims)
    # NaN and infinities show in the extremes, so that the usual, finite case needs no second look at the data.
    # (The branch reads CPU values; other devices and traced graphs always take the second look instead.)
    if known_ordered(low, high):
        return as_dtype(low, torch.float32), as_dtype(high, torch.float32), None
    finite = torch.isfinite(x)
    low = torch.where(finite, x, torch.inf).amin(dims)
    high = torch.where(finite, x, -torch.inf).amax(dims)
    return low.float(), high.float(), (~finite).sum()


def update_range(
    low: Tensor,
    high: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    averaging_constant: float | None,
    copy_above: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the new running range, ``(min_val, max_val)``, from a batch's smallest and largest finite value.

    Without ``averaging_constant`` the range holds the extremes of all batches. With it, each end m becomes
    ``m + c (end - m)``, and the first batch replaces the range. With ``copy_above`` so does a batch whose magnitude,
    ``max(-low, high)``, is more than ``copy_above`` times the running one's, or less than 1/100 of it and not 0 (after
    an outlier). A batch without finite values (``low > high``) changes nothing. Each channel is merged for itself, and
    no argument is changed.

    Args:
        low: smallest finite value of the batch, 0-d or (channels,); +inf if there is none.
        high: largest, or -inf.
        min_val: of the running range; more than ``max_val`` before the first batch.
        max_val: of the running range.
        averaging_constant: ``c``, the weight of the batch; None: no average.
        copy_above: a batch whose magnitude is more than this times the running one's replaces the range, and so does
            one far below; None: only the first batch does. Not used without ``averaging_constant``.
    """
    if averaging_constant is None:
        return torch.minimum(min_val, low), torch.maximum(max_val, high)
    seen = min_val <= max_val
    if copy_above is not None:
        # In float64, where the product is rounded as Python rounds it.
        running, batch = (torch.maximum(-m, M).double() for m, M in ((min_val, max_val), (low, high)))
        seen = seen & (batch <= copy_above * running) & ((running <= FALL * batch) | (batch == 0))
    new_min = torch.where(seen, min_val + averaging_constant * (low - min_val), low)
    new_max = torch.where(seen, max_val + averaging_constant * (high - max_val), high)
    usable = low <= high
    return torch.where(usable, new_min, min_val), torch.where(usable, new_max, max_val)


def update_number(
    low: _Number,
    high: _Number,
    min_val: _Number,
    max_val: _Number,
    averaging_constant: float | None,
    copy_above: float | None = None,
) -> tuple[_Number, _Number]:
    """Return the running range ``min_val..max_val`` merged with a batch's ``low..high``, as :func:`update_range` does.

    The four ends are NumPy numbers of one dtype; the bits are the same. ``low <= high``, both finite. Before the first
    batch ``min_val`` is +inf and ``max_val`` is -inf. ``averaging_constant`` is the batch's weight in an average; None:
    the range holds the extremes of all batches. In an average the first batch replaces the range, and with
    ``copy_above`` a batch whose magnitude is more than ``copy_above`` times the running one's, or less than 1/100 of it
    and not 0.
    """
    if averaging_constant is None:
        return min(min_val, low), max(max_val, high)
    running, batch = float(max(-min_val, max_val)), float(max(-low, high))
    leaves = copy_above is not None and (batch > copy_above * running or (running > FALL * batch and batch != 0))
    if not min_val <= max_val or leaves:
        return low, high
    constant = type(low)(averaging_constant)
    return min_val + constant * (low - min_val), max_val + constant * (high - max_val)


def merge_range_(low: Tensor, high: Tensor, statistics: RangeStatistics, grid: Grid | None) -> None:
    """Merge a finite batch into a running range, in place, and write the scale and zero point of ``grid`` that follow.

    All tensors are on the CPU. The statistics' switch and ``frozen`` are not read.

    Args:
        low: smallest value of the batch, shaped as ``statistics.min_val``; finite.
        high: largest value, not below ``low``; finite.
        statistics: the running range, updated; it says how batches are merged.
        grid: updated; its zero point may be None if the type fixes it. None: only the range is updated.
    """
    min_val, max_val, rule = statistics.min_val, statistics.max_val, statistics.rule
    averaging_constant, copy_above = statistics.averaging_constant, statistics.copy_above
    if low.dim() == 0 and rule != "torch_v1" and min_val.dtype in _NUMBERS:
        merge_numbers_(float(low), float(high), statistics, grid)
        return
    if averaging_constant is None:
        torch.minimum(min_val, low, out=min_val)
        torch.maximum(max_val, high, out=max_val)
    elif copy_above is None and min_val.numel() and float(min_val.amax()) < math.inf:
        share = operand(averaging_constant, min_val)
        min_val.add_(torch.sub(low, min_val).mul_(share))
        max_val.add_(torch.sub(high, max_val).mul_(share))
    else:
        new_min, new_max = update_range(low, high, min_val, max_val, averaging_constant, copy_above)
        min_val.copy_(new_min)
        max_val.copy_(new_max)
    if grid is not None:
        write_qparams_(statistics, grid, ordered=True)


def merge_numbers_(low: float, high: float, statistics: RangeStatistics, grid: Grid | None) -> None:
    """Merge a finite batch, ``low <= high``, into a running range of one element, and write what follows to ``grid``.

    ``statistics`` are updated in place; they say how batches are merged and how scale and zero point follow. The bits
    are those of :func:`merge_range_`. A grid of None is not written. The switch and ``frozen`` are not read.

    Raises:
        ValueError: the rule is ``"torch_v1"``.
    """
    min_val, max_val, rule = statistics.min_val, statistics.max_val, statistics.rule
    if rule == "torch_v1":
        raise ValueError("the rule torch_v1 is computed on tensors")
    kind = _NUMBERS[min_val.dtype]
    ends = (kind(low), kind(high), kind(float(min_val)), kind(float(max_val)))
    with np.errstate(over="ignore"):
        new_min, new_max = update_number(*ends, statistics.averaging_constant, statistics.copy_above)
    min_val.fill_(float(new_min))
    max_val.fill_(float(new_max))
    if grid is not None:
        number, zero = number_to_qparams(float(new_min), float(new_max), grid.qtype, rule, statistics.eps)
        grid.scale.fill_(number)
        if grid.zero_point is not None:
            grid.zero_point.fill_(zero)


def write_qparams_(statistics: RangeStatistics, grid: Grid, ordered: bool = False) -> None:
    """Write the scale and zero point that follow from a running range into ``grid``, in place.

    The statistics' rule says how they follow (formulas in :func:`tritonq.qparams.range_to_qparams`). A range without
    data (``min_val > max_val``), or one that is not finite, gives scale 1, and as zero point the one that type and rule
    fix, else 0, clamped to the codes. If the grid's zero point is None, only the scale is written.

    ``ordered``: whether the caller knows that every range is finite and has ``min_val <= max_val``; if True, that is
    not checked.
    """
    ends = (statistics.min_val, statistics.max_val)
    qparams = range_to_qparams(*ends, grid.qtype, rule=statistics.rule, eps=statistics.eps, ordered=ordered)
    grid.scale.copy_(qparams.scale.view_as(grid.scale))
    if grid.zero_point is not None:
        grid.zero_point.copy_(qparams.zero_point.view_as(grid.zero_point))


def merge_where_(
    low: Tensor,
    high: Tensor,
    nonfinite: Tensor | None,
    statistics: RangeStatistics,
    grid: Grid | None,
    enabled: Tensor | None,
) -> None:
    """Merge any batch into a running range, and write what follows to ``grid``, in place, on any device.

    No value is read on the host. A batch without finite values leaves the range as it is; the grid is written from the
    range all the same, with scale 1 if that has no data.

    Args:
        low: smallest finite value of the batch, float32, shaped as ``statistics.min_val``; +inf if there is none.
        high: largest finite value, as ``low``; -inf if there is none.
        nonfinite: number of values that are not finite, added to ``statistics.nonfinite_count``; None for zero.
        statistics: the running range, updated; it says how batches are merged. Its switch and ``frozen`` are not read.
        grid: its scale and zero point are written; None: only the range is updated.
        enabled: 0-d bool tensor: False leaves everything as it is. None counts as True.
    """
    running = (statistics.min_val, statistics.max_val)
    new_min, new_max = update_range(low, high, *running, statistics.averaging_constant, statistics.copy_above)
    _assign(statistics.min_val, new_min, enabled)
    _assign(statistics.max_val, new_max, enabled)
    if nonfinite is not None:
        _assign(statistics.nonfinite_count, statistics.nonfinite_count + nonfinite, enabled)
    if grid is None:
        return
    scale, zero_point = range_to_qparams(*running, grid.qtype, rule=statistics.rule, eps=statistics.eps)
    _assign(grid.scale, scale.view_as(grid.scale), enabled)
    if grid.zero_point is not None:
        _assign(grid.zero_point, zero_point.view_as(grid.zero_point), enabled)


def _assign(buffer: Tensor, value: Tensor, enabled: Tensor | None) -> None:
    buffer.copy_(value if enabled is None else torch.where(enabled, value, buffer))


@operator(
    mutates=("statistics.min_val", "statistics.max_val", "statistics.nonfinite_count", "grid.scale", "grid.zero_point"),
    visible=True,
)
def observe(x: Tensor, statistics: RangeStatistics, grid: Grid | None = None) -> None:
    """Merge ``x`` into a running range, and write the scale and zero point of ``grid`` that follow, in place.

    Args:
        x: the batch: any shape, any float dtype. Values that are not finite are left out and counted.
        statistics: the running range; it says how batches are merged and which elements share a range. Nothing happens
            while it is frozen or its switch is 0.
        grid: its scale and zero point are written; None: only the range is updated.
    """
    if statistics.frozen:
        return
    switch = enabled = statistics.enabled
    if switch is not None and is_readable(switch):
        if not bool(switch):
            return
        enabled = None
    low, high, nonfinite = extremes(x, statistics.granularity.axis)
    if nonfinite is None and enabled is None:
        merge_range_(low, high, statistics, grid)
        return
    merge_where_(low, high, nonfinite, statistics, grid, None if enabled is None else enabled.view(()) != 0)


def _zero_count(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=x.device)
