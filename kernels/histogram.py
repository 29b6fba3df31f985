"""Histograms: one read of the batch gives counts, exact extremes and the number of values that are not finite.

The bins follow the top bits of a float32, its *prefix* (`tritonq.bins`): PER_SIDE bins for each sign, and one for zero
between them. Counts are integers, so their order does not matter: programs add theirs with integer atomics. A *share*
is the part of the tensor that one program reads. Functions here have the names, signatures and results of
`tritonq.reference.histogram`, their specification. `tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached_launch import Launcher
from .channel_tiles import (
    max_per_channel,
    min_per_channel,
    share_bounds,
    share_channels,
    share_offsets,
    share_tile,
)
from .constants import INF
from .launch_sizes import device_guard
from .min_max import finish_kernel
from .quantized import NO_RANGE
from .reduction import plan_reduction, viewed

_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
# The magnitude bits of infinity; NaN is above.
_INFINITE_BITS = tl.constexpr(0x7F800000)
# Bins that a program counts in registers: half of them per sign, so with 16 steps per octave the top 8 octaves of what
# it sees first. `tl.histogram` costs a quarter of an instruction per bin and value (perf/codegen.py, sm_90), so all
# 2048 would take 20 times as long as the read; what lies outside, 1 in 80 of normally distributed values, goes to
# memory by itself. All in all 140 instructions per value: predicted at a fifth of an H200's memory rate, not measured.
_WINDOW = 256
# Elements of one channel to a program of the linear histogram, eight to a lane. Not measured.
_LINEAR_BLOCK = 1024


@triton.jit
def bin_of(prefix, negative, FIRST_PREFIX: tl.constexpr, PER_SIDE: tl.constexpr):
    """Return the index of the bin of floats with ``prefix``, the top bits of their magnitude, and with this sign.

    Bin PER_SIDE is that of zero and of magnitudes below FIRST_PREFIX. FIRST_PREFIX has bin PER_SIDE + 1, the prefix
    after it PER_SIDE + 2, and so on up to 2 · PER_SIDE, which also counts all larger magnitudes. With a negative sign
    the bins are PER_SIDE - 1, PER_SIDE - 2, and so on down to 0.
    """
    outward = tl.minimum(tl.maximum(prefix - (FIRST_PREFIX - 1), 0), PER_SIDE)
    return tl.where(negative, PER_SIDE - outward, PER_SIDE + outward)


@Launcher
@triton.jit
def prefix_histogram_kernel(
    x_ptr,  # outer × rows × cols, by strides
    histogram_ptr,  # (channels, 2 * PER_SIDE + 1) int64, added to
    partial_ptr,  # 2 × splits × channels float32: minima, maxima
    enabled_ptr,  # one uint8, 0 ends the kernel; None counts as 1
    nonfinite_ptr,  # one int64, grows by the number of values that are not finite
    x_strides,
    sizes,  # (outer, rows, cols)
    share,  # elements that one program reads along each dimension, whole tiles
    split_strides,  # factors of the program's numbers along each dimension; the sum of products is its split's number
    splits,  # how many there are: partial results per channel
    channels,
    SHIFT: tl.constexpr,  # low bits of a float32 that a prefix leaves out
    FIRST_PREFIX: tl.constexpr,  # prefix of the smallest magnitude with a bin of its own
    PER_SIDE: tl.constexpr,  # bins per sign
    WINDOW: tl.constexpr,  # bins that a program counts in registers, half per sign; 0: none, as it must be with CHANNEL
    CHANNEL: tl.constexpr,  # dimension with the channels: 0, 1 or 2; None: one channel
    ROWS: tl.constexpr,  # of a tile, the elements that a program reads at a time
    COLS: tl.constexpr,
    FIRST: tl.constexpr,  # dimension of the tensor on the first axis of the launch
    WIDE: tl.constexpr,  # whether offsets take 64 bits
):
    """Add the counts of one share to the histogram, and write its smallest and largest finite value per channel.

    Without a finite value these are +inf and -inf.
    """
    if enabled_ptr is not None and tl.load(enabled_ptr) == 0:
        return
    start, end, split = share_bounds(sizes, share, split_strides, FIRST, WIDE)

    low = tl.full([ROWS, COLS], INF, tl.float32)
    high = tl.full([ROWS, COLS], -INF, tl.float32)
    skipped = tl.zeros([ROWS, COLS], tl.int32)
    HALF: tl.constexpr = WINDOW // 2
    base = 0
    if WINDOW:
        counts = tl.zeros([WINDOW], tl.int32)
        place, mask = share_tile(start[0], start[1], start[2], end, ROWS, COLS)
        mask = mask & (start[0] < end[0])
        x = tl.load(x_ptr + share_offsets(place, x_strides), mask=mask, other=0).to(tl.float32)
        bits = x.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS
        largest = tl.max(tl.max(tl.where(bits < _INFINITE_BITS, bits, 0), 1), 0)
        # The window ends with the octave of the largest value.
        base = (((largest >> 23) + 1) << (23 - SHIFT)) - HALF

    for outer in range(start[0], end[0]):
        for row in range(start[1], end[1], ROWS):
            for col in range(start[2], end[2], COLS):
                place, mask = share_tile(outer, row, col, sizes, ROWS, COLS)
                x = tl.load(x_ptr + share_offsets(place, x_strides), mask=mask, other=0).to(tl.float32)
                bits = x.to(tl.int32, bitcast=True)
                negative = bits < 0
                magnitude = bits & _MAGNITUDE_BITS
                finite = mask & (magnitude < _INFINITE_BITS)
                low = tl.minimum(low, tl.where(finite, x, INF))
                high = tl.maximum(high, tl.where(finite, x, -INF))
                skipped += (mask & (magnitude >= _INFINITE_BITS)).to(tl.int32)
                prefix = magnitude >> SHIFT
                alone = finite
                if WINDOW:
                    slot = prefix - base
                    inside = finite & (slot >= 0) & (slot < HALF)
                    index = tl.where(inside, tl.where(negative, slot + HALF, slot), 0)
                    counts += tl.histogram(
                        tl.reshape(index, [ROWS * COLS]), WINDOW, mask=tl.reshape(inside, [ROWS * COLS])
                    )
                    # Zeros are many after a ReLU: one addition for all of them, below.
                    alone = finite & (inside == 0) & (magnitude != 0)
                    zeros = tl.sum(tl.sum((finite & (inside == 0) & (magnitude == 0)).to(tl.int64), 1), 0)
                    tl.atomic_add(histogram_ptr + PER_SIDE, zeros, mask=zeros > 0)
                number = bin_of(prefix, negative, FIRST_PREFIX, PER_SIDE)
                if CHANNEL is not None:
                    # Histograms of many channels hold more elements than the tensor.
                    number = number.to(tl.int64) + place[CHANNEL] * tl.full([], 2 * PER_SIDE + 1, tl.int64)
                tl.atomic_add(histogram_ptr + number, tl.full([ROWS, COLS], 1, tl.int64), mask=alone)

    if WINDOW:
        slot = tl.arange(0, WINDOW)
        prefix = base + (slot & (HALF - 1))
        number = bin_of(prefix, slot >= HALF, FIRST_PREFIX, PER_SIDE)
        tl.atomic_add(histogram_ptr + number, counts.to(tl.int64), mask=counts > 0)
    total_skipped = tl.sum(tl.sum(skipped, 1), 0)
    tl.atomic_add(nonfinite_ptr, total_skipped.to(tl.int64), mask=total_skipped > 0)

    channel, valid = share_channels(start, channels, CHANNEL, ROWS, COLS)
    partial_index = split * channels + channel
    tl.store(partial_ptr + partial_index, min_per_channel(low, CHANNEL), mask=valid)
    tl.store(partial_ptr + splits * channels + partial_index, max_per_channel(high, CHANNEL), mask=valid)


@Launcher
@triton.jit
def linear_histogram_kernel(
    x_ptr,  # (channels, length) contiguous
    histogram_ptr,  # (channels, bins) int64, added to
    limits_ptr,  # (2,) float32: lower end of the first bin, upper end of the last one
    length,  # elements of a channel
    blocks,  # of BLOCK elements, in a channel
    bins,  # how many a channel has
    parts,  # the same number as ``bins``, as a float
    BLOCK: tl.constexpr,  # elements of a channel read at a time
):
    """Add the counts of BLOCK elements of one channel to its histogram of equal bins.

    An element at the upper limit counts in the last bin, as does one whose quotient is NaN: that of equal limits is.
    Elements outside the limits, and NaN, are not counted.
    """
    program = tl.program_id(0)
    channel = (program // blocks).to(tl.int64)
    at = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + channel * length + at, mask=at < length, other=float("nan")).to(tl.float32)
    lo = tl.load(limits_ptr)
    hi = tl.load(limits_ptr + 1)
    inside = (x >= lo) & (x <= hi)
    position = tl.div_rn((x - lo) * parts, tl.zeros([BLOCK], tl.float32) + (hi - lo))
    # NaN is no index, and is not less than any number.
    index = tl.where(inside & (position < parts), position, parts - 1).to(tl.int32)
    tl.atomic_add(histogram_ptr + channel * bins + index, tl.full([BLOCK], 1, tl.int64), mask=inside)


def linear_histogram(x: Tensor, bins: int, limits: Tensor, axis: int | None = None) -> Tensor:
    """Return how many elements lie in each of ``bins`` equal bins between the two ``limits``, both included.

    int64 (bins,); with ``axis`` one histogram per index of it, (x.shape[axis], bins). ``x`` is float32, float16 or
    bfloat16, ``limits`` is (2,): lower and upper end. An element's bin is ``floor((x - low) · bins / (high - low))``,
    and the last one for the upper end or where that is NaN. Elements outside, and NaN, are not counted.
    """
    channels = 1 if axis is None else x.shape[axis]
    rows = x if axis is None else x.movedim(axis, 0)
    rows = rows.reshape(channels, x.numel() // max(1, channels)).contiguous()
    counts = torch.zeros((rows.shape[0], bins), dtype=torch.int64, device=x.device)
    if rows.numel():
        with device_guard(x):
            # The first axis of a grid takes 2^31 programs, the others 65535.
            blocks = triton.cdiv(rows.shape[1], _LINEAR_BLOCK)
            linear_histogram_kernel[(blocks * rows.shape[0],)](
                rows,
                counts,
                limits.float(),
                rows.shape[1],
                blocks,
                bins,
                float(bins),
                BLOCK=_LINEAR_BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return counts[0] if axis is None else counts


def prefix_histogram(x: Tensor, bins: Any, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return counts, smallest and largest finite value, and the number of values that are not finite.

    Args:
        x: float32, float16 or bfloat16.
        bins: :class:`tritonq.bins.FloatPrefixBins`.
        axis: that of the channels, each with counts and ends of its own; None: all values together.

    Returns:
        int64 (bins.count,) or (channels, bins.count); float32 0-d or (channels,), twice; int64 0-d, of all channels.
        Without a finite value the ends are +inf and -inf.
    """
    shape = () if axis is None else (x.shape[axis],)
    counts = torch.zeros((*shape, bins.count), dtype=torch.int64, device=x.device)
    low = torch.full(shape, torch.inf, dtype=torch.float32, device=x.device)
    high = torch.full(shape, -torch.inf, dtype=torch.float32, device=x.device)
    nonfinite = torch.zeros((), dtype=torch.int64, device=x.device)
    observe(x, counts, low, high, nonfinite, None, bins, axis)
    return counts, low, high, nonfinite


def observe(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    enabled: Tensor | None,
    bins: Any,
    axis: int | None,
) -> None:
    """Add ``x`` to a histogram, and merge its smallest and largest finite value into the range; in place on the device.

    Args:
        x: the batch; float32, float16 or bfloat16.
        histogram: int64 counts, (bins.count,) or (channels, bins.count).
        min_val: running minimum, float32, 0-d or (channels,); +inf before the first batch.
        max_val: running maximum, as ``min_val``; -inf before the first batch.
        nonfinite_count: int64, 0-d; grows by the number of NaN and infinities, which are left out of all else.
        enabled: the switch, one element; 0 changes nothing. None: always on.
        bins: the bins, a `tritonq.bins.FloatPrefixBins`.
        axis: channel axis of ``x``; None: one histogram for all.
    """
    x, seen = viewed(x, axis)
    if seen.channels == 0 or seen.numel == 0:
        return
    shares = plan_reduction(x, seen)
    partial = shares.partial(2, x.device)
    with device_guard(x):
        prefix_histogram_kernel[shares.grid.programs](
            x,
            histogram,
            partial,
            enabled,
            nonfinite_count,
            *seen.strides,
            *shares.arguments,
            SHIFT=bins.shift,
            FIRST_PREFIX=bins.first_prefix,
            PER_SIDE=bins.per_side,
            # Several channels would each need a window of their own.
            WINDOW=_WINDOW if seen.channel is None else 0,
            **shares.constants,
        )
        finish_kernel[shares.joining_programs](
            partial,
            enabled,
            min_val,
            max_val,
            None,
            None,
            None,
            0.0,
            shares.splits,
            shares.channels,
            **NO_RANGE,
            **shares.joining_constants,
        )
