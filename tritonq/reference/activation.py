"""Observing and quantizing an activation that was just computed, in place, and where its gradient passes.

The operators that end in ReLU and fake quantization share these functions. The ReLU is one number, its *ceiling*:
infinity for a plain ReLU, 6 for ReLU6, b for ``clamp(y, 0, b)``, and None for no ReLU. Other docstrings write
``relu?(y)`` for :func:`rectify`. The gradient *passes* a value if neither ReLU nor the clip of the quantizer changes
it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.arithmetic import as_dtype
from tritonq.grid import Grid, RangeStatistics
from tritonq.qparams import is_readable
from tritonq.reference.fake_quant import fake_quantize, steps_
from tritonq.reference.min_max import extremes
from tritonq.reference.open_bounds import between, open_bounds
from tritonq.reference.ranges import observe_range


def rectify(y: Tensor, ceiling: float | None) -> Tensor:
    """Return ``min(max(y, 0), ceiling)``, differentiable; ``y`` itself if ``ceiling`` is None."""
    if ceiling is None:
        return y
    return F.relu(y) if ceiling == math.inf else F.hardtanh(y, 0.0, ceiling)


def rectify_(y: Tensor, ceiling: float | None) -> Tensor:
    """Replace ``y`` by ``min(max(y, 0), ceiling)``, in place; return it. A ceiling of None changes nothing."""
    if ceiling is None:
        return y
    return y.relu_() if ceiling == math.inf else y.clamp_(0.0, ceiling)


def rectify_backward(dy: Tensor, y: Tensor, ceiling: float) -> Tensor:
    """Return the gradient of :func:`rectify` from its result ``y``: ``dy`` where ``0 < y < ceiling``, else 0.

    ``dy`` passes where ``y`` is NaN too, and where ``y`` is infinity if that is the ceiling.
    """
    if ceiling == math.inf:
        return torch.ops.aten.threshold_backward(dy, y, 0)  # type: ignore[no-any-return]
    # As the result holds it: rounded to its dtype.
    top = float(torch.tensor(ceiling, dtype=y.dtype))
    return between(dy, y, 0.0, top)


class Observed(NamedTuple):
    """The result of :func:`observe`.

    Attributes:
        statistics: the given running range, with ``has_data`` set if the host knows that it holds data; None for None.
        finite: whether every value is known to be finite.
    """

    statistics: RangeStatistics | None
    finite: bool


def observe(y: Tensor, grid: Grid, statistics: RangeStatistics | None, ceiling: float | None) -> Observed:
    """Update a running range, and the grid that follows from it, with ``relu?(y)``, in place; ``y`` is not changed.

    NaN and infinities in ``y`` are left out; ``statistics.nonfinite_count`` grows by their number.

    Args:
        y: float32 or float64, before the ReLU.
        grid: per tensor; its scale and zero point are updated in place.
        statistics: the running range, updated in place. If it is None, frozen or switched off, nothing is updated.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one; None: no ReLU.

    Returns:
        The statistics, with ``has_data`` set if the host knows now that the range holds data, and whether all of ``y``
        is known to be finite (False if nothing was observed).
    """
    if statistics is None or statistics.frozen:
        return Observed(statistics, False)
    if is_readable(y) and statistics.enabled is not None and not bool(statistics.enabled):
        return Observed(statistics, False)
    low, high, nonfinite = extremes(y)
    return Observed(observe_ends(low, high, nonfinite, grid, statistics, ceiling), nonfinite is None)


def observe_ends(
    low: Tensor,
    high: Tensor,
    nonfinite: Tensor | None,
    grid: Grid,
    statistics: RangeStatistics | None,
    ceiling: float | None,
) -> RangeStatistics | None:
    """Update a running range and its grid with ``relu?(y)``, in place, from the two ends of the range of a batch ``y``.

    Args:
        low: smallest finite value of ``y`` before the ReLU, 0-d; +inf if there is none. Its memory may be overwritten.
        high: largest finite value, 0-d; -inf if there is none. Its memory may be overwritten.
        nonfinite: how many values are not finite, one element, which is added to ``statistics.nonfinite_count``; None:
            the host knows that there are values and all are finite.
        grid: per tensor; its scale and zero point are updated in place.
        statistics: the running range, updated in place. If it is None, frozen or switched off, neither it nor the grid
            is changed.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one; None: no ReLU.

    Returns:
        ``statistics``, with ``has_data`` set if the host knows now that the range holds data; None for None.
    """
    if nonfinite is None:
        ends = (low, high) if ceiling is None else (low.clamp_(0.0, ceiling), high.clamp_(0.0, ceiling))
        return observe_range(grid, statistics, *ends, ordered=True)
    if ceiling is not None:
        # The extremes of relu?(y); a batch without finite values keeps low > high.
        some = low <= high
        low, high = (torch.where(some, end.clamp(0.0, ceiling), end) for end in (low, high))
    return observe_range(grid, statistics, low, high, nonfinite)


def quantize_(y: Tensor, grid: Grid, ceiling: float | None) -> Tensor:
    """Return ``FQ(relu?(y))``; overwrites ``y``. While the grid is switched off, only the ReLU is applied.

    The result may be another tensor than ``y``, whose values then mean nothing.

    Args:
        y: float32 or float64, any shape.
        grid: per tensor, integer codes; nothing is observed.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one; None: no ReLU.
    """
    enabled = grid.enabled_flag()
    if enabled is False:
        return rectify_(y, ceiling)
    if enabled is not True:
        y = rectify_(y, ceiling)
        return torch.where(enabled, fake_quantize(y, grid.with_buffers(grid.scale, grid.zero_point, None)), y)
    scale, qtype = as_dtype(grid.scale, y.dtype).view(()), grid.qtype
    zero = 0 if grid.zero_point is None else int(grid.zero_point)
    lowest, highest = float(qtype.quant_min - zero), float(qtype.quant_max - zero)
    if ceiling is not None:
        lowest = max(lowest, 0.0)
        if ceiling < math.inf:
            # Rounding keeps order: to clip the steps at those of the ceiling is to clip the values, one pass less.
            highest = min(highest, float(steps_(scale.new_tensor(ceiling), scale, qtype.rounding)))
    return steps_(y, scale, qtype.rounding).clamp_(lowest, highest).mul_(scale)


def straight_through_(
    dy: Tensor,
    y: Tensor,
    grid: Grid | None,
    ceiling: float | None,
    finite: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``dy`` where neither ReLU nor the clip blocks it, else 0; both block where ``y`` is NaN.

    The ReLU passes ``0 < y < ceiling`` (a plain one infinity, too), the clip values whose rounded, unclipped code lies
    in ``quant_min..quant_max``. Without either, nothing is blocked, and the result may be ``dy`` itself.

    Args:
        dy: in the dtype of ``y``, float32 or float64; shaped as ``y`` or 0-d.
        y: the values before ReLU and rounding; may be overwritten.
        grid: of the quantizer, per tensor; None, or switched off: there is no clip.
        ceiling: upper bound of the ReLU before it, infinity for a plain one; None: no ReLU.
        finite: whether all of ``y`` is known to be finite.
        out: memory that the result may be written to, in place of ``y``, which then stays as it is if ``finite`` is
            True. None: ``y``.
    """
    enabled = False if grid is None else grid.enabled_flag()
    if isinstance(enabled, Tensor) and grid is not None:
        return torch.where(passes(y, grid, ceiling, enabled), dy, 0)
    low, high = -math.inf, math.inf
    if enabled is True and grid is not None:
        zero = 0 if grid.zero_point is None else int(grid.zero_point)
        lowest, highest = grid.qtype.quant_min - zero, grid.qtype.quant_max - zero
        low, high = open_bounds(float(grid.scale), lowest, highest, grid.qtype.rounding, y.dtype)
    elif ceiling is None:
        return dy
    if ceiling is not None:
        low, high = max(low, 0.0), min(high, ceiling)
    # Strictly between the bounds; NaN compares as inside, so that it is moved out first, and an infinite y in.
    if not finite:
        y.nan_to_num_(-torch.inf, torch.finfo(y.dtype).max, -torch.inf)
    return between(dy, y, low, high, out=y if out is None else out)


def passes(y: Tensor, grid: Grid | None, ceiling: float | None, enabled: Tensor | None = None) -> Tensor:
    """Return a new bool tensor: where neither the ReLU nor the quantizer's clip blocks the gradient.

    A ReLU passes ``0 < y < ceiling`` (a plain one infinity, too), the clip values whose rounded, unclipped code lies in
    ``quant_min..quant_max``; neither passes NaN.

    Args:
        y: values before ReLU and rounding; not changed.
        grid: of the quantizer, per tensor; its own switch is not read. None without one.
        ceiling: upper bound of the ReLU, infinity for a plain one; None without a ReLU.
        enabled: the switch to use, a bool tensor; False: the clip blocks nothing, the ReLU as before. None: on.
    """
    inside = torch.ones_like(y, dtype=torch.bool)
    if grid is not None:
        qtype, scale = grid.qtype, grid.scale.to(y.dtype).view(())
        steps = steps_(y.clone(), scale, qtype.rounding)
        code = steps if grid.zero_point is None else steps + grid.zero_point
        inside = (code >= qtype.quant_min) & (code <= qtype.quant_max)
        inside = inside if enabled is None else inside | ~enabled
    if ceiling is None:
        return inside
    # An infinite ceiling blocks nothing, an infinite y neither.
    return inside & (y > 0) if ceiling == math.inf else inside & (y > 0) & (y < ceiling)
