"""Folding, observing and quantizing a weight in C++: two reads and a write forward, and as much backward.

Functions are those of `tritonq.reference.weight`, which computes what the compiled code can't. A weight is given as
*rows*, (out, ...). Its *fold* is a factor per row, γ/σ of the BatchNorm. Results are `WeightCodes`: codes
``clip(round(rows · fold / s) + z) - z`` with scale s and zero point z of the grid, float32; their unit s, (out,): codes
times unit is the folded, rounded weight; whether a value may lie outside the codes; and a copy of the grid as this step
used it. While the grid is switched off, codes are ``rows · fold``, and their unit is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.compiled.arguments import (
    are_vectors,
    follows_a_rule,
    is_plain,
    note_observed,
    observes,
    range_arguments,
    rounds_to_even_integers,
)
from tritonq.compiled.build import library
from tritonq.grid import Grid, RangeStatistics
from tritonq.qparams import fixed_zero_point
from tritonq.reference import weight as reference
from tritonq.reference.ranges import snapshot
from tritonq.reference.weight import WeightCodes


def quantize_folded(
    rows: Tensor,
    fold: Tensor,
    grid: Grid | None,
    statistics: RangeStatistics | None,
    out: Tensor | None = None,
) -> WeightCodes:
    """Observe the range of a folded weight, update the grid, and return the weight's codes on the updated grid.

    Args:
        rows: the weight, (out, ...), any float dtype.
        fold: (out,), the factor of each row, in the dtype of the arithmetic: float32 or float64.
        grid: of the quantizer, per out channel (axis 0) or per tensor, updated in place; None: nothing is observed, and
            the folded weight stays in float.
        statistics: the running range of the grid, updated in place with the folded weight; None observes nothing.
        out: memory for the codes, shaped as ``rows``, in the dtype of ``fold``; None: new memory.
    """
    if grid is None or not takes(rows, fold, grid, out) or not follows(grid, statistics, len(rows)):
        return reference.quantize_folded(rows, fold, grid, statistics, out)
    functions, count = library(), len(rows)
    low, high = torch.empty_like(fold), torch.empty_like(fold)
    found = (low.data_ptr(), high.data_ptr())
    if not functions.weight_extremes(rows.data_ptr(), count, rows.numel() // count, fold.data_ptr(), *found):
        return reference.quantize_folded(rows, fold, grid, statistics, out)
    changes = observes(statistics)
    clips = functions.weight_ranges(*found, count, changes, *range_arguments(grid, statistics))
    if changes and statistics is not None:
        note_observed(grid, statistics)
        statistics = statistics.with_data()
    return _codes(rows, fold, snapshot(grid, statistics), bool(clips), out)


def folded_codes(
    rows: Tensor,
    fold: Tensor,
    grid: Grid | None,
    out: Tensor | None = None,
    extremes: tuple[Tensor, Tensor] | None = None,
) -> WeightCodes:
    """Return ``clip(round(rows · fold / s) + z) - z`` on the scale s and zero point z of ``grid``; nothing is observed.

    With it come the codes' unit, whether a value may be clipped (True also if that is not known), and ``grid`` itself.

    Args:
        rows: the weight, (out, ...).
        fold: (out,), the factor of each row.
        grid: the copy of the grid that :func:`quantize_folded` returned; None: codes are the folded weight, units 1.
        out: memory for the codes, shaped as ``rows``, in the dtype of ``fold``; None: new memory.
        extremes: smallest and largest folded value per row, (out,) each, from which the reference tells whether a value
            is clipped; None: not known. The compiled code does not read them.
    """
    if grid is None or not takes(rows, fold, grid, out):
        return reference.folded_codes(rows, fold, grid, out, extremes)
    return _codes(rows, fold, grid, True, out)


def folded_backward(
    dcodes: Tensor,
    rows: Tensor,
    fold: Tensor,
    unit: Tensor,
    grid: Grid | None,
    clips: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weight, (out, ...), and of the fold, (out,), from the gradient of the codes.

    With ``q = dcodes / unit``, 0 where the code was clipped: ``fold · q`` and, per row, ``Σ q · rows``, both in the
    dtype of ``fold``.

    Args:
        dcodes: gradient of the codes, shaped as ``rows``; its memory may be overwritten.
        rows: the weight, not folded.
        fold: (out,), the factor of each row.
        unit: (out,), the unit of the codes of which ``dcodes`` is the gradient.
        grid: the copy of the grid from the forward; None without a quantizer.
        clips: from the forward; False: no value was clipped, so no gradient is blocked.
    """
    masks = clips and grid is not None and grid.is_enabled_on_host()
    if not takes(rows, fold, grid, dcodes) or dcodes.stride() != rows.stride() or not are_vectors(unit):
        return reference.folded_backward(dcodes, rows, fold, unit, grid, clips)
    dfold, count = torch.empty_like(fold), len(rows)
    scale, scales, limits = None, 1, (0.0, 0.0)
    if masks and grid is not None:
        scale, scales = grid.scale.data_ptr(), grid.scale.numel()
        limits = (grid.qtype.quant_min, grid.qtype.quant_max)
    library().weight_backward(
        *(dcodes.data_ptr(), rows.data_ptr(), count, rows.numel() // count, fold.data_ptr(), unit.data_ptr()),
        *(scale, scales, masks, *limits, dcodes.data_ptr(), dfold.data_ptr()),
    )
    return dcodes, dfold


def takes(rows: Tensor, fold: Tensor, grid: Grid | None, out: Tensor | None) -> bool:
    """Whether compiled code can fold this weight and round it to this grid.

    It can if rows, fold and out are float32 on the CPU, of no subclass but Parameter and outside of dispatch modes and
    transforms such as ``vmap``; the weight is not empty, its rows are dense, ``fold`` is contiguous, ``out`` is None or
    has the weight's strides; and the grid is None, or has integer codes, ``zero_point`` None, ties to even, one scale
    or one per row, and no switch or one of one element on the CPU.

    Args:
        rows: the weight, (out, ...).
        fold: (out,), the factor of each row.
        grid: of the quantizer; None: the weight is not rounded.
        out: memory for the result; None: none is given.
    """
    if not (rows.numel() and is_plain(rows, out) and are_vectors(fold) and _rows_are_dense(rows)):
        return False
    if out is not None and out.stride() != rows.stride():
        return False
    if grid is None:
        return True
    one_switch = grid.enabled is None or (grid.enabled.is_cpu and grid.enabled.numel() == 1)
    per_row = grid.qtype.axis in (None, 0)
    return per_row and one_switch and grid.zero_point is None and rounds_to_even_integers(grid)


def follows(grid: Grid, statistics: RangeStatistics | None, count: int) -> bool:
    """Whether there is one scale per row, and C++ can update each from its row's range.

    It can if scales and ranges are contiguous float32 on the CPU, one per row; type and ``statistics.rule``, by which
    the grid follows from the range, fix the zero point at 0; the rule is not "torch_v1"; and ``statistics.eps``, the
    smallest scale, is above 0.

    Args:
        grid: of the quantizer.
        statistics: the grid's running range; None: the scales stay as they are, and only they have to be such tensors.
        count: number of rows.
    """
    if grid.qtype.axis != 0 or grid.scale.numel() != count or not are_vectors(grid.scale):
        return False
    if statistics is None:
        return True
    ranges = (statistics.min_val, statistics.max_val)
    follows = follows_a_rule(statistics) and fixed_zero_point(grid.qtype, statistics.rule) == 0
    return follows and are_vectors(*ranges) and all(end.numel() == count for end in ranges)


def _codes(rows: Tensor, fold: Tensor, grid: Grid, clips: bool, out: Tensor | None) -> WeightCodes:
    """Return the codes of a folded weight on ``grid``, without observing; :func:`takes` must accept the weight.

    ``clips`` is whether codes are clipped to the range; it may be True although no value lies outside.
    """
    if not grid.is_enabled_on_host():
        return reference.folded_codes(rows, fold, grid, out)
    codes, count, scale = torch.empty_like(rows) if out is None else out, len(rows), grid.scale
    library().weight_codes(
        *(rows.data_ptr(), count, rows.numel() // count, fold.data_ptr(), scale.data_ptr(), scale.numel()),
        *(clips, grid.qtype.quant_min, grid.qtype.quant_max, codes.data_ptr()),
    )
    return WeightCodes(codes, scale.expand(count), clips, grid)


def _rows_are_dense(rows: Tensor) -> bool:
    """Whether each row fills its part of the memory without gaps, in whatever order."""
    if rows.is_contiguous():
        return True
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(rows.dim())
    return last is not None and rows.is_contiguous(memory_format=last)
