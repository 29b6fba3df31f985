"""The histogram whose bins move with the running range, as MegEngine and torch.ao keep it, and its range search.

When the range grows, old bins are cut into *slices*, and the counts of each slice go to the new bin that it lies in.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tritonq.reference.search import cell_error

Interpolation = Literal["torch", "megengine"]

# Slices that an old bin is cut into before it is dealt out to new ones.
TORCH_SLICES, MEGENGINE_SLICES = 16, 128
# The greedy search trims this share of the counts per step.
_QUANTILE_STEP = 1e-5


def rebin(histogram: Tensor, old: tuple[float, float], new: tuple[float, float], slices: int = TORCH_SLICES) -> Tensor:
    """Return counts over the range ``new``, which contains ``old``.

    The counts of each slice of an old bin go to the new bin in which the slice's middle lies.

    Args:
        histogram: float64, (bins,), on the CPU.
        old: the histogram's range; if both ends are equal, all counts are of one value.
        new: the new range.
        slices: slices per old bin.

    Returns:
        float64, (bins,).

    Source: torch.ao.quantization.HistogramObserver.
    """
    bins = len(histogram)
    if old == new:
        return histogram.clone()
    # torch's arithmetic, in float32 as there: a middle on a boundary must fall on the same side.
    size = torch.tensor(old[1] - old[0], dtype=torch.float32) / (bins * slices)
    middles = torch.linspace(old[0], old[1], bins * slices + 1)[:-1] + 0.5 * size
    index = torch.bucketize(middles, torch.linspace(new[0], new[1], bins + 1), right=True) - 1
    return torch.bincount(
        index.clamp_(0, bins - 1), weights=histogram.repeat_interleave(slices) / slices, minlength=bins
    )


def spike(bins: int, value: float, limits: tuple[float, float]) -> Tensor:
    """Return a histogram with one count at ``value``: float64 (bins,) over ``limits``.

    If both limits are equal, the count is in the middle bin.
    """
    share = (value - limits[0]) / (limits[1] - limits[0]) if limits[1] > limits[0] else 0.5
    counts = torch.zeros(bins, dtype=torch.float64)
    counts[min(int(share * bins), bins - 1)] = 1
    return counts


def widened_range(
    bins: int, old: tuple[float, float], new: tuple[float, float], slices: int = MEGENGINE_SLICES
) -> tuple[tuple[float, float], int, int]:
    """Return MegEngine's new range: ``new``, widened evenly until each new bin holds a whole number of old slices.

    Args:
        bins: number of bins.
        old: the histogram's range.
        new: the range that it must hold.
        slices: slices per old bin.

    Returns:
        ``(range, per_bin, start)``: the new range, old slices per new bin, and the index of the first old slice among
        the slices of the new range.
    """
    width = (old[1] - old[0]) / (bins * slices)
    per_bin = math.ceil((new[1] - new[0]) / (bins * width))
    excess = per_bin * bins * width - (new[1] - new[0])
    low, high = new[0] - excess / 2, new[1] + excess / 2
    return (low, high), per_bin, round((old[0] - low) / width)


def rebin_aligned(histogram: Tensor, per_bin: int, start: int, slices: int = MEGENGINE_SLICES) -> Tensor:
    """Return counts over :func:`widened_range`, float64 (bins,); ``per_bin`` and ``start`` are its other results."""
    bins = len(histogram)
    index = (torch.arange(bins * slices) + start).div_(per_bin, rounding_mode="floor").clamp_(0, bins - 1)
    weights = histogram.repeat_interleave(slices) / slices
    return torch.bincount(index, weights=weights, minlength=bins)


def greedy_range(histogram: Tensor, low: float, high: float, cells: int) -> tuple[float, float]:
    """Return a range found by trimming both ends step by step until the squared error rises.

    In each step 1e-5 of the counts are left out, at the end where that frees more bins. The remaining range is cut into
    ``cells`` equal cells; the error is the squared distance to their centres, as in
    :func:`tritonq.reference.search.cell_error`. The search stops at the first rise.

    Args:
        histogram: float64, (bins,), on the CPU.
        low: lower edge of the first bin.
        high: upper edge of the last bin.
        cells: number of codes.

    Source: caffe2's norm minimization, as in torch.ao and MegEngine; docs/numbers.md, "Histograms".
    """
    bins = len(histogram)
    width = (high - low) / bins
    if width == 0:
        return low, high
    below = histogram.cumsum(0).tolist()
    total = below[-1]
    edges = torch.arange(bins + 1, dtype=torch.float64)
    lower, upper, first, last = 0.0, 1.0, 0, bins - 1
    least = math.inf
    while lower < upper:
        next_lower, next_upper = lower + _QUANTILE_STEP, upper - _QUANTILE_STEP
        left, right = first, last
        while left < last and below[left] < next_lower * total:
            left += 1
        while right > first and below[right] > next_upper * total:
            right -= 1
        if left - first > last - right:
            candidate, lower = (left, last), next_lower
        else:
            candidate, upper = (first, right), next_upper
        if candidate == (first, last):
            continue
        error = _window_error(histogram, edges, *candidate, cells)
        if error > least:
            break
        least, (first, last) = error, candidate
    return low + width * first, low + width * (last + 1)


def _window_error(histogram: Tensor, edges: Tensor, first: int, last: int, cells: int) -> float:
    """Return the squared error of the bins ``first..last``, cut into ``cells`` cells, in squared bin widths."""
    step = torch.full((1, 1), (last - first + 1) / cells, dtype=torch.float64)
    zero = torch.zeros_like(step)
    return float(cell_error(edges[None], histogram[None], step, first + step / 2, zero, zero + (cells - 1)))
