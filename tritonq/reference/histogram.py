"""Histograms in PyTorch: the specification of `tritonq.kernels.histogram` and the CPU path.

Bins are equal, or *prefix* bins (:class:`tritonq.bins.FloatPrefixBins`): values with the same sign, exponent and top
mantissa bits share one, and they ascend from the most negative values over one bin around zero to the largest. Counting
is `torch.bincount` on small integers; it is several times faster than `torch.histc`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.bins import FloatPrefixBins
from tritonq.reference.min_max import RANGE, min_max, range_shape
from tritonq.reference.operator import New, operator

# The exponent field of NaN and the infinities.
INFINITE_EXPONENT = 255
_BFLOAT_MANTISSA = 7
# Counting into two tables in turn: a run of equal values (a ReLU's zeros) would wait for each of its own increments.
# Takes 3.2 million values after a ReLU from 4.2 to 3.1 ms, and others nothing (one thread, AMD EPYC).
_TABLES, _TURN = 2, 1024
_MAGNITUDE_BITS = 0x7FFFFFFF
_INT16_MAX, _INT32_MAX = 2**15 - 1, 2**31 - 1


def _linear_shape(arguments: dict[str, Any]) -> tuple[int, ...]:
    return (*range_shape(arguments), arguments["bins"])


@operator(returns=New(_linear_shape, "x", torch.int64))
def linear_histogram(x: Tensor, bins: int, limits: Tensor, axis: int | None = None) -> Tensor:
    """Return counts over equal bins: bin ``floor((x - lo) · bins / (hi - lo))``; ``hi`` is in the last bin.

    Values outside ``[lo, hi]`` and NaN are not counted. The counts equal those of torch.histc: the arithmetic is the
    same, float64 if ``x`` is, else float32. If lo = hi, values equal to it are counted in the last bin; so are values
    whose quotient is infinity by infinity.

    Args:
        x: any shape, any float dtype.
        bins: number of bins.
        limits: (2,) of any float dtype, on the device of ``x``: lo and hi, the outer edges of the bins. If
            lo > hi, nothing is counted.
        axis: one histogram per index of this axis; None for one.

    Returns:
        int64, (bins,) or (x.shape[axis], bins).
    """
    values = _by_channel(x, axis).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    low, high = limits.to(values.dtype).unbind()
    inside = (values >= low) & (values <= high)
    position = (values - low) * bins / (high - low)
    # No clamp, which keeps NaN, of 0 / 0 for one: it is no index.
    torch.fmin(position, position.new_tensor(bins - 1), out=position)
    # One more bin takes what is not counted, and NaN, which no integer can hold.
    index = torch.where(inside, position, bins).to(torch.int32)
    counts = _count_rows(index, bins + 1)[:, :bins]
    return counts.reshape(-1) if axis is None else counts.contiguous()


def _counts_shape(arguments: dict[str, Any]) -> tuple[int, ...]:
    return (*range_shape(arguments), arguments["bins"].count)


@operator(
    returns=(
        New(_counts_shape, "x", torch.int64),
        *(RANGE, RANGE),
        New(lambda arguments: (), "x", torch.int64),
    )
)
def prefix_histogram(
    x: Tensor, bins: FloatPrefixBins, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return counts over ``bins``, the exact range of the finite values, and how many values are not finite.

    Args:
        x: any shape, any float dtype (float64 is counted as float32); may be empty.
        bins: the bins; values beyond the outermost count in these.
        axis: one histogram per index of this axis; None for one.

    Returns:
        ``(counts, low, high, nonfinite)``: int64 (bins.count,) or (x.shape[axis], bins.count); float32 0-d or
        (x.shape[axis],), +inf and -inf without a finite value; int64 0-d, a number for all of ``x``.
    """
    low, high, _ = min_max(x, axis)
    values = _by_channel(x, axis)
    counts, nonfinite = _count_prefixes(values[0], bins) if axis is None else _count_prefixes_per_row(values, bins)
    return counts, low, high, nonfinite


@operator(mutates=("histogram", "min_val", "max_val", "nonfinite_count"))
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
        bins: the prefix bins.
        axis: channel axis of ``x``; None: one histogram and range for all values.
    """
    if enabled is not None and enabled.is_cpu and not bool(enabled):
        return
    counts, low, high, nonfinite = prefix_histogram(x, bins, axis)
    if enabled is not None and not enabled.is_cpu:
        on = enabled.view(()) != 0
        counts, nonfinite = counts * on, nonfinite * on
        low, high = torch.where(on, low, torch.inf), torch.where(on, high, -torch.inf)
    histogram.add_(counts)
    min_val.copy_(torch.minimum(min_val, low))
    max_val.copy_(torch.maximum(max_val, high))
    nonfinite_count.add_(nonfinite)


def _by_channel(x: Tensor, axis: int | None) -> Tensor:
    """Return ``x`` as (channels, values), one row per histogram; without ``axis`` one row.

    The order within a row is free, so a dense ``x`` without channels is not copied.
    """
    if axis is not None:
        return x.movedim(axis, 0).reshape(x.shape[axis], x.numel() // max(1, x.shape[axis]))
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(1, -1)


def _count_prefixes(values: Tensor, bins: FloatPrefixBins) -> tuple[Tensor, Tensor]:
    """Return counts over ``bins``, and how many values are not finite.

    Values outside of the bins count in the nearest.
    """
    negatives = 1 << (8 + bins.mantissa_bits)
    # An arithmetic shift of a negative float's bits gives its magnitude's prefix less `negatives`.
    if values.dtype == torch.bfloat16 and 2 * negatives * _TABLES <= _INT16_MAX + 1:
        prefix = values.view(torch.int16) >> (_BFLOAT_MANTISSA - bins.mantissa_bits)
    else:
        prefix = values.float().view(torch.int32) >> bins.shift
    table = torch.arange(_TURN, dtype=prefix.dtype, device=prefix.device) % _TABLES * (2 * negatives)
    whole = len(prefix) // _TURN * _TURN
    prefix[:whole].view(-1, _TURN).add_(table.add_(negatives))
    prefix[whole:].add_(negatives)
    raw = torch.bincount(prefix, minlength=2 * negatives * _TABLES).view(_TABLES, 2, negatives).sum(0)
    first, last = bins.first_prefix, bins.first_prefix + bins.per_side
    infinite = INFINITE_EXPONENT << bins.mantissa_bits
    side = raw[:, first:last].clone()
    side[:, -1] += raw[:, last:infinite].sum(1)
    counts = torch.cat((side[0].flip(0), raw[:, :first].sum().view(1), side[1]))
    return counts, raw[:, infinite:].sum()


def _count_prefixes_per_row(values: Tensor, bins: FloatPrefixBins) -> tuple[Tensor, Tensor]:
    """Return counts over ``bins`` of each row, int64 (rows, bins.count), and how many values of all are not finite."""
    bits = values.float().view(torch.int32)
    magnitude = (bits & _MAGNITUDE_BITS) >> bins.shift
    position = (magnitude - (bins.first_prefix - 1)).clamp_(0, bins.per_side)
    position = torch.where(bits < 0, -position, position).add_(bins.per_side)
    position = torch.where(magnitude >= INFINITE_EXPONENT << bins.mantissa_bits, bins.count, position)
    counts = _count_rows(position, bins.count + 1)
    return counts[:, : bins.count].contiguous(), counts[:, bins.count].sum()


def _count_rows(index: Tensor, size: int) -> Tensor:
    """Return how often each number below ``size`` occurs in each row of ``index``, int32: int64 (rows, size)."""
    rows = index.shape[0]
    if rows > 1:
        wide = index.long() if rows * size > _INT32_MAX else index
        index = wide + torch.arange(rows, device=index.device, dtype=wide.dtype).view(-1, 1) * size
    return torch.bincount(index.reshape(-1), minlength=rows * size).view(rows, size)
