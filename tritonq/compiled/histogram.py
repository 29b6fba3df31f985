"""`tritonq.reference.histogram` in C++: counts and range of a whole tensor in one pass over it, by every thread.

Counts are the reference's. What the compiled code does not take (histograms per channel, equal bins, other dtypes) the
reference computes. The bins (:class:`tritonq.bins.FloatPrefixBins`) hold values with the same sign, exponent and top
mantissa bits; they ascend from the most negative values over one bin around zero to the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tritonq.bins import FloatPrefixBins
from tritonq.compiled.arguments import is_plain
from tritonq.compiled.build import library
from tritonq.reference import histogram as reference
from tritonq.reference.histogram import INFINITE_EXPONENT
from tritonq.reference.scratch import is_dense

linear_histogram = reference.linear_histogram


def prefix_histogram(
    x: Tensor, bins: FloatPrefixBins, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return counts over ``bins``, the exact range of the finite values, and how many values are not finite.

    Args:
        x: any shape, may be empty; any float dtype, float64 counts as float32. Values not finite are in no bin.
        bins: the bins; finite values beyond the outermost count in these.
        axis: one histogram per index of this axis; None for one.

    Returns:
        ``(counts, low, high, nonfinite)``: int64 (bins.count,) or (x.shape[axis], bins.count); float32 0-d or
        (x.shape[axis],), +inf and -inf without a finite value; int64 0-d, over all channels. New, on ``x``'s device.
    """
    if not _takes(x, axis):
        return reference.prefix_histogram(x, bins, axis)
    counts = torch.zeros(bins.count, dtype=torch.int64)
    low, high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    return counts, low, high, torch.tensor(_count(x, bins, counts, low, high))


def observe(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    enabled: Tensor | None,
    bins: FloatPrefixBins,
    axis: int | None,
) -> None:
    """Add ``x`` to a histogram and to its running range, in place.

    Args:
        x: the batch: any shape, any float dtype. Values that are not finite are in no bin and not in the range.
        histogram: int64, (bins.count,) or (channels, bins.count).
        min_val: the smallest value of all batches, float32, 0-d or (channels,), +inf before the first batch.
        max_val: the largest, as ``min_val``, -inf before the first batch.
        nonfinite_count: int64, 0-d; the number of values that are not finite is added to it.
        enabled: uint8, one element; 0 makes the call do nothing. None counts as 1.
        bins: the bins.
        axis: axis of ``x`` whose indices, the channels, have a histogram and a range each; None: one for all values.
    """
    on_cpu = enabled is None or enabled.is_cpu
    if not (on_cpu and _takes(x, axis) and is_plain(min_val, max_val) and histogram.is_contiguous()):
        reference.observe(x, histogram, min_val, max_val, nonfinite_count, enabled, bins, axis)
    elif enabled is None or bool(enabled):
        nonfinite_count.add_(_count(x, bins, histogram, min_val, max_val))
        increment_version((histogram, min_val, max_val))


def _takes(x: Tensor, axis: int | None) -> bool:
    """Whether compiled code can count the values of ``x``: float32 on the CPU, dense, not empty, without ``axis``."""
    return axis is None and is_plain(x) and x.numel() > 0 and is_dense(x)


def _count(x: Tensor, bins: FloatPrefixBins, counts: Tensor, low: Tensor, high: Tensor) -> int:
    """Add ``x`` to ``counts``, widen ``low`` and ``high`` in place, and return how many values are not finite.

    ``counts`` are int64 (bins.count,), over ``bins``; ``low`` and ``high``, float32 0-d, the smallest and the largest
    finite value so far.
    """
    infinite = INFINITE_EXPONENT << bins.mantissa_bits
    numbers = (bins.shift, bins.first_prefix, bins.per_side, infinite)
    into = (counts.data_ptr(), low.data_ptr(), high.data_ptr())
    return int(library().prefix_counts(x.data_ptr(), x.numel(), *numbers, *into))
