"""The histogram whose bins move with the running range, as MegEngine and torch.ao keep it, and its range search.

When the range grows, old bins are cut into *slices*, and the counts of each slice go to the new bin that it lies in.
Ranges are tensors, (2,) float64, so that nothing here reads a value on the host where they lie on another device. On a
CPU, where reading costs nothing, steps that change nothing are left out.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tritonq.qparams import is_readable
from tritonq.reference.operator import Like, New, operator
from tritonq.reference.search import cell_error

Interpolation = Literal["torch", "megengine"]

# Slices that an old bin is cut into before it is dealt out to new ones.
TORCH_SLICES, MEGENGINE_SLICES = 16, 128
# The greedy search trims this share of the counts per step, so that each end has so many steps.
_QUANTILE_STEP = 1e-5
_STEPS = 100_001
# Windows whose errors are computed at a time: their intermediates stay small, and on a CPU few are computed in vain.
_WINDOWS_AT_A_TIME = 64


def _pair(arguments: dict[str, Any]) -> tuple[int, ...]:
    return (2,)


@operator(returns=(New(_pair, "limits", torch.float64), Like("histogram")), has_kernel=False)
def grown(
    histogram: Tensor, limits: Tensor, batch: Tensor, interpolation: Interpolation, slices: int
) -> tuple[Tensor, Tensor]:
    """Return the range that holds ``limits`` and ``batch``, and the old counts over it; the batch is not counted.

    ``"torch"``: slices of old bins go to the new bins that their middles lie in. ``"megengine"``: the range is widened
    evenly on both sides until each new bin is a whole number of old slices, which keep their places. If ``limits`` are
    one value, both do as ``"torch"``.

    Args:
        histogram: float64, (bins,), counts over equal bins of ``limits``.
        limits: smallest and largest value so far, (2,) float64; +inf and -inf before the first batch.
        batch: smallest and largest value of the batch, as ``limits``; +inf and -inf without a finite value.
        interpolation: ``"torch"`` or ``"megengine"``.
        slices: slices per old bin.

    Returns:
        ``(range, counts)``: (2,) and (bins,), float64, new tensors. If the range stays, or before the first batch,
        counts are as they were.
    """
    new = torch.stack((torch.minimum(limits[0], batch[0]), torch.maximum(limits[1], batch[1])))
    stays = (limits[0] > limits[1]) | (new == limits).all()
    if is_readable(stays) and bool(stays):
        return new, histogram.clone()
    old = torch.where(stays, new, limits)
    is_range = old[0] < old[1]
    if interpolation == "torch" or (is_readable(is_range) and not bool(is_range)):
        return new, torch.where(stays, histogram, rebin(histogram, old, new, slices))
    wide, per_bin, start = widened(len(histogram), old, new, slices)
    kept = rebin_aligned(histogram, per_bin, start, slices)
    if not is_readable(is_range):
        kept = torch.where(is_range, kept, rebin(histogram, old, new, slices))
    moves = is_range & ~stays
    return torch.where(moves, wide, new), torch.where(stays, histogram, kept)


def rebin(histogram: Tensor, old: Tensor, new: Tensor, slices: int = TORCH_SLICES) -> Tensor:
    """Return counts over the range ``new``, which contains ``old``: slices of old bins are put where their middles are.

    Args:
        histogram: float64, (bins,).
        old: its range, (2,) float64; where both ends are equal all counts are one value's.
        new: the range wanted, (2,) float64.
        slices: slices per old bin.

    Returns:
        float64, (bins,).

    Source: torch.ao.quantization.HistogramObserver.
    """
    bins = len(histogram)
    # torch's arithmetic, in float32 as there: a middle on a boundary must fall on the same side.
    size = (old[1] - old[0]).float() / (bins * slices)
    middles = _points(old, bins * slices + 1)[:-1] + 0.5 * size
    index = torch.bucketize(middles, _points(new, bins + 1), right=True) - 1
    counts = _dealt_out(histogram, index.clamp_(0, bins - 1), slices)
    return torch.where((old == new).all(), histogram, counts)


def _points(limits: Tensor, count: int) -> Tensor:
    """Return ``torch.linspace`` between two ends, float32: its own on a CPU, elsewhere by its formula for GPUs."""
    if is_readable(limits):
        return torch.linspace(float(limits[0]), float(limits[1]), count)
    low, high = limits.float().unbind()
    step, at = (high - low) / (count - 1), torch.arange(count, device=limits.device)
    return torch.where(at < count // 2, low + step * at, high - step * (count - 1 - at))


def _dealt_out(histogram: Tensor, index: Tensor, slices: int) -> Tensor:
    """Return counts of new bins, float64 (bins,): each slice's share of its old bin goes to a new bin.

    ``index`` has the new bin of each slice, int64 (bins · slices,), ascending; ``histogram`` the old counts.
    """
    bins = len(histogram)
    if is_readable(histogram):
        return torch.bincount(index, weights=histogram.repeat_interleave(slices) / slices, minlength=bins)
    # By the number of slices that each new bin has of each old one: without floating-point atomics.
    number = torch.arange(bins + 1, device=index.device)
    ends = torch.searchsorted(index, number)
    old = number * slices
    shared = torch.minimum(ends[1:, None], old[1:]) - torch.maximum(ends[:-1, None], old[:-1])
    return (shared.clamp_(min=0) * (histogram / slices)).sum(1)


def widened(bins: int, old: Tensor, new: Tensor, slices: int = MEGENGINE_SLICES) -> tuple[Tensor, Tensor, Tensor]:
    """Return MegEngine's new range: ``new``, widened evenly until each new bin is a whole number of old slices.

    A slice is ``w = (old[1] - old[0]) / (bins · slices)`` wide; a new bin has ``ceil((new[1] - new[0]) / (bins · w))``
    of them.

    Args:
        bins: number of bins, old and new.
        old: the range so far, (2,) float64.
        new: the range wanted, which contains it, (2,) float64.
        slices: slices per old bin.

    Returns:
        The range, (2,) float64, the old slices per new bin, and the index of the first old slice among those of the new
        range, ``round((old[0] - range[0]) / w)``; int64, 0-d. Nothing of meaning where ``old`` is one value.
    """
    width = (old[1] - old[0]) / (bins * slices)
    width = torch.where(width > 0, width, 1.0)
    per_bin = torch.ceil((new[1] - new[0]) / (bins * width))
    excess = per_bin * bins * width - (new[1] - new[0])
    low, high = new[0] - excess / 2, new[1] + excess / 2
    return torch.stack((low, high)), per_bin.long().clamp_(min=1), ((old[0] - low) / width).round().long()


def rebin_aligned(histogram: Tensor, per_bin: Tensor, start: Tensor, slices: int = MEGENGINE_SLICES) -> Tensor:
    """Return counts over the range of :func:`widened`, float64 (bins,): each slice of an old bin keeps its place.

    Args:
        histogram: float64, (bins,), over the old range.
        per_bin: old slices per new bin, int64, 0-d.
        start: index of the first old slice among the slices of the new range, int64, 0-d.
        slices: slices per old bin.
    """
    bins = len(histogram)
    index = (torch.arange(bins * slices, device=histogram.device) + start).div(per_bin, rounding_mode="floor")
    return _dealt_out(histogram, index.clamp_(0, bins - 1), slices)


@operator(returns=New(_pair, "limits", torch.float64), has_kernel=False)
def greedy_range(histogram: Tensor, limits: Tensor, cells: int) -> Tensor:
    """Return the range at which trimming quantiles first stops lowering the squared error.

    From the end where that frees more bins (the upper one where both free as many), 1e-5 of the counts are given up,
    again and again; the range that is left is cut into ``cells`` equal cells, and the error is the squared distance to
    their centres, as in :func:`tritonq.reference.search.cell_error`. The search stops at the first rise; the first step
    is always taken.

    Which windows the steps would lead to does not depend on errors, so that they are found at once.

    Args:
        histogram: float64, (bins,).
        limits: (2,) float64, finite, the outer edges of the bins.
        cells: number of codes.

    Returns:
        (2,) float64; equal to ``limits`` if these are one value or all counts are 0.

    Source: caffe2's norm minimization, as in torch.ao and MegEngine; docs/numbers.md, "Histograms".
    """
    bins = len(histogram)
    first, last, count = _windows(histogram)
    edges = torch.arange(bins + 1, dtype=torch.float64, device=histogram.device)
    errors = [torch.full((1,), torch.inf, dtype=torch.float64, device=histogram.device)]
    for start in range(1, bins, _WINDOWS_AT_A_TIME):
        if is_readable(count) and (start > int(count) or bool((torch.cat(errors).diff() > 0).any())):
            break
        chunk = slice(start, min(start + _WINDOWS_AT_A_TIME, bins))
        errors.append(_window_errors(histogram, edges, first[chunk], last[chunk], cells))
    error = torch.cat(errors)
    exists = torch.arange(1, len(error), device=count.device) <= count
    rises = (error.diff() > 0) & exists
    chosen = ((rises.cumsum(0) == 0) & exists).sum().view(1)
    width = (limits[1] - limits[0]) / bins
    window = torch.cat((first.index_select(0, chosen), last.index_select(0, chosen) + 1))
    return torch.where(width == 0, limits, limits[0] + width * window)


def _windows(histogram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first and last bins of the windows that trimming leads to, (bins + 1,), and how many follow the whole.

    ``histogram`` is float64, (bins,). The first window is the whole; entries behind the last window mean nothing.

    A step takes the end that frees more bins, the upper one where both free as many. So the order of all steps is that
    of merging two sequences by their heads, the larger first: as merging their running minima, which are sorted.
    """
    bins, device = len(histogram), histogram.device
    below = histogram.cumsum(0) if is_readable(histogram) else _running_totals(histogram)
    lower, upper = _quantiles(device)
    left = torch.searchsorted(below, lower * below[-1]).clamp_(max=bins - 1)
    right = torch.searchsorted(below, upper * below[-1], right=True) - 1
    from_left, from_right = left.diff().cummin(0).values, (-right.diff()).cummin(0).values
    place = torch.arange(_STEPS, device=device)
    place += torch.searchsorted(-from_right, -from_left, right=True)
    is_left = torch.zeros(_STEPS + 1, dtype=torch.int64, device=device)
    is_left = is_left.scatter_(0, place.clamp_(max=_STEPS), 1)[:_STEPS]
    i = is_left.cumsum(0) - is_left
    j = torch.arange(_STEPS, device=device) - i
    low, high, next_low, next_high = left[i], right[j], left[i + 1], right[j + 1]
    # Where an end would pass the other one it stops there: one bin is left, and no step changes it.
    collapses = (next_low > high) | (next_high < low)
    goes_left = torch.where(
        collapses,
        torch.minimum(next_low, high) - low > high - torch.maximum(next_high, low),
        is_left.bool(),
    )
    runs = (lower[i] < upper[j]) & (collapses.cumsum(0) - collapses.long() == 0)
    first = torch.where(goes_left, torch.minimum(next_low, high), low)
    last = torch.where(goes_left, high, torch.maximum(next_high, low))
    changes = runs & ((first != low) | (last != high))
    # The whole comes first; what changes nothing goes behind all others.
    slot = torch.where(changes, changes.cumsum(0), bins)
    firsts = torch.zeros(bins + 1, dtype=torch.int64, device=device).scatter_(0, slot, first)
    lasts = torch.full_like(firsts, bins - 1).scatter_(0, slot, last)
    return firsts, lasts, changes.sum()


@cache
def _quantiles(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the shares of the counts at which steps of the lower and of the upper end stop, float64 vectors.

    They are multiples of 1e-5 from 0 up and from 1 down, added up one by one as the search does.
    """
    lower = np.cumsum(np.full(_STEPS, _QUANTILE_STEP))
    upper = np.cumsum(np.concatenate(([1.0], np.full(_STEPS, -_QUANTILE_STEP))))
    return torch.tensor([0.0, *lower], dtype=torch.float64, device=device), torch.tensor(upper, device=device)


def _running_totals(histogram: Tensor) -> Tensor:
    """Return the cumulative sum in an order that is the same in each run, which that of a GPU is not."""
    number = torch.arange(len(histogram), device=histogram.device)
    return torch.where(number <= number[:, None], histogram, 0.0).sum(1)


def _window_errors(histogram: Tensor, edges: Tensor, first: Tensor, last: Tensor, cells: int) -> Tensor:
    """Return the squared error of each window of bins ``first..last``, cut into ``cells`` cells: float64 (windows,).

    It is the sum of counts times mean squared distances to the cells' centres, in units of bins. ``histogram`` is
    (bins,), ``edges`` are 0 to bins, (bins + 1,).
    """
    step = (last - first + 1).double()[None] / cells
    zero = torch.zeros_like(step)
    return cell_error(edges[None], histogram[None], step, first + step / 2, zero, zero + (cells - 1))[0]
