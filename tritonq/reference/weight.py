"""Folding, observing and quantizing a weight in PyTorch: the specification of `tritonq.kernels.weight`, the CPU path.

A weight is given as *rows*, (out, ...), one per out channel. The *fold* is a factor per out channel that the weight is
multiplied by before it is quantized (γ/σ of its BatchNorm). Results are ``clip(round(rows · fold / s) + z) - z`` with
scale s and zero point z of the weight's grid; times s they are the folded, rounded weight.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype
from tritonq.grid import Grid, RangeStatistics
from tritonq.qparams import is_readable
from tritonq.quantized_type import QuantizedType
from tritonq.reference.fake_quant import reciprocal, steps_
from tritonq.reference.min_max import min_max
from tritonq.reference.open_bounds import between
from tritonq.reference.operator import CopyOf, Given, Like, New, operator
from tritonq.reference.ranges import OBSERVED, observe_range, snapshot
from tritonq.reference.scratch import borrow


class WeightCodes(NamedTuple):
    """A folded and quantized weight: ``codes · unit`` are its values.

    Attributes:
        codes: ``code - zero_point``, integer-valued, in the fold's dtype, shaped as the rows; the folded weight itself
            while quantization is off: no grid, one switched off, or a range without data.
        unit: (out,) in the dtype of ``codes``, their factor, 1 while quantization is off; may share ``grid``'s memory.
        clips: whether some value lay outside the code range, so that its gradient is zero; True if not known.
        grid: a snapshot: a copy of the grid as this step used it, for the backward; None without a quantizer.
    """

    codes: Tensor
    unit: Tensor
    clips: bool
    grid: Grid | None


_CODES: Any = Like("rows", "fold")
_UNIT: Any = New(lambda arguments: (len(arguments["rows"]),), "fold")
_SNAPSHOT: Any = CopyOf("grid", lambda arguments: (len(arguments["rows"]),))
_GRID: Any = Given("grid")


@operator(
    returns=WeightCodes(_CODES, _UNIT, True, _SNAPSHOT),
    mutates=OBSERVED,
    scratch=("out",),
    visible=True,
    made_again=True,
)
def quantize_folded(
    rows: Tensor,
    fold: Tensor,
    grid: Grid | None,
    statistics: RangeStatistics | None,
    out: Tensor | None = None,
) -> WeightCodes:
    """Return the codes of a weight times its fold, which is observed first and quantized to the grid that follows.

    Args:
        rows: (out, ...), any float dtype.
        fold: (out,), in the dtype of the arithmetic: float32 or float64.
        grid: per out channel (axis 0) or per tensor, updated in place; None: nothing is observed, and the folded weight
            stays in float.
        statistics: the running range of the grid, updated in place with the folded weight; None observes nothing.
        out: memory for the codes: shaped as ``rows``, in the dtype of ``fold``; None: new memory.
    """
    rows = as_dtype(rows, fold.dtype)
    if grid is None:
        return folded_codes(rows, fold, None, out)
    low, high = _folded_extremes(rows, fold)
    # Of one tensor, the smallest value is not above the largest; NaN in either fails.
    if is_readable(low) and len(low) and -math.inf < float(low.amin()) and float(high.amax()) < math.inf:
        ends = (low.amin(), high.amax()) if grid.granularity.is_per_tensor else (low, high)
        statistics = observe_range(grid, statistics, *ends, ordered=True)
    else:
        statistics = observe_range(grid, statistics, *min_max(rows * _column(fold, rows), grid.qtype.axis))
    return folded_codes(rows, fold, snapshot(grid, statistics), out, (low, high))


@operator(returns=WeightCodes(_CODES, _UNIT, True, _GRID), scratch=("out", "extremes"), visible=True, made_again=True)
def folded_codes(
    rows: Tensor,
    fold: Tensor,
    grid: Grid | None,
    out: Tensor | None = None,
    extremes: tuple[Tensor, Tensor] | None = None,
) -> WeightCodes:
    """Return ``clip(round(rows · fold / s) + z) - z`` on the scale s and zero point z of ``grid``; nothing is observed.

    With it come the codes' unit (out,), ``clips``, and ``grid`` itself. ``clips`` is False if quantization is known to
    be off or ``extremes`` lie on the grid, True if they do not, are None, or the host would have to wait to read them.

    Args:
        rows: (out, ...), any float dtype.
        fold: (out,), in the dtype of the arithmetic.
        grid: the snapshot that the forward made; None, or switched off: codes are the folded weight, their unit 1.
        out: memory for the codes: shaped as ``rows``, in the dtype of ``fold``; None: new memory.
        extremes: smallest and largest folded value per channel, (out,) each; None: not known.
    """
    rows = as_dtype(rows, fold.dtype)
    enabled = False if grid is None else _enabled(grid, rows)
    if enabled is False or grid is None:
        return WeightCodes(torch.mul(rows, _column(fold, rows), out=out), torch.ones_like(fold), False, grid)
    scale, zero_point, qtype = as_dtype(grid.scale, fold.dtype), grid.zero_point, grid.qtype
    clips = extremes is None or not is_readable(rows) or _any_clips(*extremes, scale, zero_point, qtype)
    codes = _steps(rows, fold, scale, qtype, out)
    if clips:
        codes = _clamp(codes, zero_point, qtype)
    unit = scale.expand(len(rows))
    if enabled is not True:
        codes = torch.where(enabled, codes, rows * _column(fold, rows))
        unit = torch.where(enabled.flatten(), unit, 1.0)
    return WeightCodes(codes, unit, clips, grid)


@operator(returns=(_CODES, Like("fold")), overwrites=("dcodes",), visible=True)
def folded_backward(
    dcodes: Tensor,
    rows: Tensor,
    fold: Tensor,
    unit: Tensor,
    grid: Grid | None,
    clips: bool,
) -> tuple[Tensor, Tensor]:
    """Return two gradients from that of the codes: of the weight and of the fold. ``dcodes`` may be overwritten.

    With ``q = dcodes / unit``, 0 where the code was clipped: ``drows = fold · q`` and, per channel,
    ``dfold = Σ q · rows``.

    Args:
        dcodes: gradient with respect to ``WeightCodes.codes``, shaped as ``rows``.
        rows: the weight, not folded.
        fold: (out,), the factor of each row.
        unit: (out,), by which the codes that were convolved have to be multiplied to be the folded, rounded weight.
        grid: the forward's snapshot; None without a quantizer.
        clips: ``WeightCodes.clips`` of the forward; False blocks no gradient.

    Returns:
        ``drows``, shaped as ``rows``, and ``dfold``, (out,), in the dtype of ``fold``; ``drows`` may be ``dcodes``.
    """
    dcodes, rows = as_dtype(dcodes, fold.dtype), as_dtype(rows, fold.dtype)
    if clips and grid is not None:
        dcodes = _straight_through(dcodes, rows, fold, grid)
    product = torch.mul(dcodes, rows, out=borrow("local", dcodes))
    dfold = product.flatten(1).sum(1).div_(unit)
    return dcodes.mul_(_column(fold / unit, rows)), dfold


def _straight_through(dcodes: Tensor, rows: Tensor, fold: Tensor, grid: Grid) -> Tensor:
    """Return ``dcodes`` where the code of ``rows · fold``, before clipping, is in range, else 0."""
    enabled = _enabled(grid, rows)
    if enabled is False:
        return dcodes
    qtype = grid.qtype
    steps = _steps(rows, fold, grid.scale.to(fold.dtype), qtype, borrow("local", rows))
    if grid.zero_point is not None:
        steps = steps.add_(_column(grid.zero_point, rows))
    # Strict bounds, half a code outwards: steps are whole.
    bounds = (qtype.quant_min - 0.5, qtype.quant_max + 0.5)
    masked = between(dcodes, steps.nan_to_num_(torch.inf), *bounds, out=dcodes if enabled is True else steps)
    return masked if enabled is True else torch.where(enabled, masked, dcodes)


def _enabled(grid: Grid, rows: Tensor) -> bool | Tensor:
    """Return whether values are rounded: a bool if that can be read without waiting, else a bool tensor (rows, 1, ...).

    A snapshot may hold one switch per row.
    """
    if grid.enabled is None or grid.enabled.numel() == 1:
        return grid.enabled_flag()
    if is_readable(grid.enabled):
        number = int(grid.enabled.count_nonzero())
        if number in (0, len(rows)):
            return number > 0
    return _column(grid.enabled != 0, rows)


def _folded_extremes(rows: Tensor, fold: Tensor) -> tuple[Tensor, Tensor]:
    """Return smallest and largest of ``rows · fold`` per channel, without computing it: rounding preserves order."""
    flat = rows.flatten(1)
    one, other = flat.amin(1) * fold, flat.amax(1) * fold
    return torch.minimum(one, other), torch.maximum(one, other)


def _any_clips(low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor | None, qtype: QuantizedType) -> bool:
    if zero_point is None and qtype.rounding == "half_even":
        # Rounding keeps order, and Python's is half to even.
        inverse = reciprocal(scale)
        smallest, largest = float((low * inverse).amin()), float((high * inverse).amax())
        finite = math.isfinite(smallest) and math.isfinite(largest)
        return not (finite and qtype.quant_min <= round(smallest) and round(largest) <= qtype.quant_max)
    low, high = (steps_(end.clone(), scale, qtype.rounding) for end in (low, high))
    if zero_point is not None:
        low, high = low + zero_point, high + zero_point
    return not (qtype.quant_min <= float(low.amin()) and float(high.amax()) <= qtype.quant_max)


def _steps(rows: Tensor, fold: Tensor, scale: Tensor, qtype: QuantizedType, out: Tensor | None) -> Tensor:
    """Return ``round(rows · fold / scale)``: product and quotient are rounded one by one, as in a deployed weight."""
    return steps_(torch.mul(rows, _column(fold, rows), out=out), _column(scale, rows), qtype.rounding)


def _clamp(steps: Tensor, zero_point: Tensor | None, qtype: QuantizedType) -> Tensor:
    """Clip ``steps``, which are codes minus zero point, to the range of codes, in place."""
    if zero_point is None:
        return steps.clamp_(qtype.quant_min, qtype.quant_max)
    column = _column(zero_point, steps)
    return steps.add_(column).clamp_(qtype.quant_min, qtype.quant_max).sub_(column)


def _column(vector: Tensor, rows: Tensor) -> Tensor:
    """Return a vector of one value per channel (or one element), shaped to broadcast against rows."""
    return vector.view(-1, *[1] * (rows.dim() - 1))
