"""Fixed point: the squared errors of all fractional lengths in one read.

A fixed-point number is ``code · 2^-frac_len``; *frac_len*, the fractional length, is the number of bits behind the
binary point. Functions here have the names, signatures and results of `tritonq.reference.fixed_point`, their
specification. Rounding to fixed point is fake quantization with a scale of ``2^-frac_len``: its kernels are those of
`tritonq.kernels.fake_quant`. `tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached_launch import Launcher
from .constants import INF
from .launch_sizes import device_guard, programs_that_fill
from .layout import View
from .quantized import QuantizedType
from .reduction import viewed
from .rounding import round_to_steps

# Elements per tile: 16 per lane at four warps, one load of 128 bits for each of float32's lanes in flight four times.
_BLOCK = 2048
_WARPS = 4


@Launcher
@triton.jit
def frac_len_errors_kernel(
    x_ptr,  # channels × outer × rows × cols, by strides
    error_ptr,  # splits × channels × CANDIDATES float64, CANDIDATES contiguous
    x_strides,
    rows,  # of a channel, in each of outer
    cols,  # elements of a row
    col_tiles,  # tiles of BLOCK elements in a row
    tiles,  # outer × rows × col_tiles
    channels,
    splits,  # programs that share one channel
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    LENGTHS: tl.constexpr,  # number of candidates: fractional lengths 0, 1, …
    CANDIDATES: tl.constexpr,  # LENGTHS, rounded up to a power of two; sums behind LENGTHS are 0
    BLOCK: tl.constexpr,  # elements read at a time
):
    """Write the sums of squared rounding errors of a program's tiles of one channel, for every fractional length.

    Squares are added in float32 within a tile, tiles in float64. Values that are not finite are left out, as are
    negative ones where QUANT_MIN is not negative.
    """
    channel = tl.program_id(0)
    split = tl.program_id(1)
    candidate = tl.arange(0, CANDIDATES)
    errors = tl.zeros([CANDIDATES], tl.float64)
    start = x_ptr + channel.to(tl.int64) * x_strides[0]
    for tile in range(split, tiles, splits):
        # Two scalar divisions for a tile of BLOCK elements.
        line = tile // col_tiles
        col = (tile - line * col_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        outer = line // rows
        row = line - outer * rows
        offset = outer.to(tl.int64) * x_strides[1] + row.to(tl.int64) * x_strides[2]
        x = tl.load(start + offset + col * x_strides[3], mask=col < cols, other=0).to(tl.float32)
        # 0 is a code of every format: values set to it err nowhere.
        counts = tl.abs(x) < INF
        if QUANT_MIN >= 0:
            counts = counts & (x > 0)
        x = tl.where(counts, x, 0.0)
        for length in tl.static_range(LENGTHS):
            # In units of this format's step: one product less per value.
            steps = x * (2.0**length)
            error = steps - round_to_steps(steps, 0, QUANT_MIN, QUANT_MAX, "half_even")
            total = tl.sum(error * error).to(tl.float64) * (0.25**length)
            errors = tl.where(candidate == length, errors + total, errors)
    tl.store(error_ptr + (split.to(tl.int64) * channels + channel) * CANDIDATES + candidate, errors)


def frac_len_errors(x: Tensor, qtype: QuantizedType, candidates: int) -> Tensor:
    """Return the squared rounding errors of ``x``, added up per fractional length f from 0 to ``candidates - 1``.

    ``Σ (x - clip(round(x 2^f)) 2^-f)²``, with the clip to the codes of ``qtype``; float64 (candidates,), or
    (candidates, channels) if ``qtype`` has an axis; 0 if ``x`` is empty. Values that are not finite, and negative ones
    if codes are unsigned, are left out: they tell no candidates apart.
    """
    axis = qtype.axis
    channels = 1 if axis is None else x.shape[axis]
    if x.numel() == 0:
        errors = torch.zeros(candidates, channels, dtype=torch.float64, device=x.device)
        return errors[:, 0] if axis is None else errors
    x, seen = viewed(x, axis)
    sizes, strides = _channel_first(seen)
    block = min(_BLOCK, triton.next_power_of_2(sizes[3]))
    col_tiles = triton.cdiv(sizes[3], block)
    tiles = sizes[1] * sizes[2] * col_tiles
    splits = max(1, min(tiles, programs_that_fill(x.device) // channels))
    width = triton.next_power_of_2(candidates)
    partial = torch.empty((splits, channels, width), dtype=torch.float64, device=x.device)
    with device_guard(x):
        frac_len_errors_kernel[(channels, splits)](
            x,
            partial,
            strides,
            sizes[2],
            sizes[3],
            col_tiles,
            tiles,
            channels,
            splits,
            QUANT_MIN=qtype.quant_min,
            QUANT_MAX=qtype.quant_max,
            LENGTHS=candidates,
            CANDIDATES=width,
            BLOCK=block,
            num_warps=_WARPS,
        )
    errors = partial.sum(0)[:, :candidates].t()
    return errors[:, 0] if axis is None else errors


def search_frac_len(x: Tensor, qtype: QuantizedType, candidates: int) -> Tensor:
    """Return which of the fractional lengths 0 to ``candidates - 1`` has least squared error; of equals the smallest.

    The errors are those of :func:`frac_len_errors`. int32: 0-d, or (channels,) if ``qtype`` has an axis. ``x`` has any
    shape and float dtype; ``qtype`` gives the codes' range.
    """
    return frac_len_errors(x, qtype, candidates).argmin(0).to(torch.int32)


def _channel_first(seen: View) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Return sizes and strides of a view as (channel, outer, rows, cols); an axis that the view lacks has size 1."""
    sizes, strides = list(seen.sizes), list(seen.strides[0])
    if seen.channel is None:
        return (1, *seen.sizes), (0, *seen.strides[0])
    size, stride = sizes.pop(seen.channel), strides.pop(seen.channel)
    return (size, 1, sizes[0], sizes[1]), (stride, 0, strides[0], strides[1])
