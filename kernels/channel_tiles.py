"""Device functions for reductions over all dimensions but the channels, and for tiles with per-channel vectors.

A program takes one share of an (outer, rows, cols) view, as `tritonq.kernels.min_max.plan_reduction` cuts it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import program_along


@triton.jit
def share_bounds(
    outers,
    rows,
    cols,
    outer_share,
    row_share,
    col_share,
    split_outer,
    split_row,
    split_col,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """From and to along each dimension of this program's share, and the number of its split."""
    outer_program = program_along(0, FIRST)
    row_program = program_along(1, FIRST)
    col_program = program_along(2, FIRST)
    split = outer_program * split_outer + row_program * split_row + col_program * split_col
    if WIDE:
        outer_program = outer_program.to(tl.int64)
        row_program = row_program.to(tl.int64)
        col_program = col_program.to(tl.int64)
    outer_from = outer_program * outer_share
    row_from = row_program * row_share
    col_from = col_program * col_share
    outer_to = tl.minimum(outer_from + outer_share, outers)
    row_to = tl.minimum(row_from + row_share, rows)
    col_to = tl.minimum(col_from + col_share, cols)
    return outer_from, outer_to, row_from, row_to, col_from, col_to, split


@triton.jit
def share_channels(
    outer_from, row_from, col_from, channels, CHANNEL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The channels of a share, (ROWS,), (COLS,) or (1,), and which of them exist."""
    if CHANNEL == 1:
        channel = row_from + tl.arange(0, ROWS)
    elif CHANNEL == 2:
        channel = col_from + tl.arange(0, COLS)
    else:
        channel = (outer_from if CHANNEL == 0 else 0) + tl.arange(0, 1)
    return channel, channel < channels


@triton.jit
def spread(vector, CHANNEL: tl.constexpr):
    """A vector over the channels of a share, shaped to broadcast against a tile."""
    if CHANNEL == 2:
        return vector[None, :]
    else:
        return vector[:, None]


@triton.jit
def sum_per_channel(tile, CHANNEL: tl.constexpr):
    """The sums of a tile, shaped as the channels of its share."""
    if CHANNEL == 1:
        return tl.sum(tile, 1)
    elif CHANNEL == 2:
        return tl.sum(tile, 0)
    else:
        return tl.sum(tl.sum(tile, 1), 0, keep_dims=True)


@triton.jit
def min_per_channel(tile, CHANNEL: tl.constexpr):
    """The smallest of a tile, shaped as the channels of its share; NaN may be lost."""
    if CHANNEL == 1:
        return tl.min(tile, 1)
    elif CHANNEL == 2:
        return tl.min(tile, 0)
    else:
        return tl.min(tl.min(tile, 1), 0, keep_dims=True)


@triton.jit
def max_per_channel(tile, CHANNEL: tl.constexpr):
    """The largest of a tile, shaped as the channels of its share; NaN may be lost."""
    return -min_per_channel(-tile, CHANNEL)


@triton.jit
def fma(x, factor, addend):
    """``x · factor + addend`` with one rounding (two in the interpreter); the last two broadcast against ``x``."""
    return tl.fma(x, tl.broadcast_to(factor, x.shape), tl.broadcast_to(addend, x.shape))
