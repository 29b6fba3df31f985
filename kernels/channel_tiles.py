"""Device functions for reductions over all dimensions but the channels, and for tiles with per-channel vectors.

A program takes one share of an (outer, rows, cols) view, as `tritonq.kernels.reduction` cuts it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import program_along


@triton.jit
def share_bounds(sizes, share, split_strides, FIRST: tl.constexpr, WIDE: tl.constexpr):
    """Return where this program's share starts and ends along (outer, rows, cols), and the number of its split.

    Args:
        sizes: of the view.
        share: what one program takes of each dimension, whole tiles.
        split_strides: of the partial results' first axis over program numbers along each dimension.
        FIRST: the dimension on the launch's first axis.
        WIDE: whether offsets need 64 bits.
    """
    outer_program = program_along(0, FIRST)
    row_program = program_along(1, FIRST)
    col_program = program_along(2, FIRST)
    split = outer_program * split_strides[0] + row_program * split_strides[1] + col_program * split_strides[2]
    if WIDE:
        outer_program = outer_program.to(tl.int64)
        row_program = row_program.to(tl.int64)
        col_program = col_program.to(tl.int64)
    outer_start = outer_program * share[0]
    row_start = row_program * share[1]
    col_start = col_program * share[2]
    outer_end = tl.minimum(outer_start + share[0], sizes[0])
    row_end = tl.minimum(row_start + share[1], sizes[1])
    col_end = tl.minimum(col_start + share[2], sizes[2])
    return (outer_start, row_start, col_start), (outer_end, row_end, col_end), split


@triton.jit
def share_channels(start, channels, CHANNEL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the channels of the share that begins at ``start``, (ROWS,), (COLS,) or (1,), and which of them exist."""
    if CHANNEL == 1:
        channel = start[1] + tl.arange(0, ROWS)
    elif CHANNEL == 2:
        channel = start[2] + tl.arange(0, COLS)
    else:
        channel = (start[0] if CHANNEL == 0 else 0) + tl.arange(0, 1)
    return channel, channel < channels


@triton.jit
def share_tile(outer, row_start, col_start, sizes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the place of one tile of a share, (outer, (ROWS, 1), (1, COLS)), and which of its elements exist."""
    row = row_start + tl.arange(0, ROWS)[:, None]
    col = col_start + tl.arange(0, COLS)[None, :]
    return (outer, row, col), (row < sizes[1]) & (col < sizes[2])


@triton.jit
def share_offsets(place, strides):
    """Return offsets of the elements of a share's tile in a tensor of these strides."""
    return place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2]


@triton.jit
def next_block(place, start, end, AHEAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return where the block after the one at ``place`` begins: columns first, then rows, then outer."""
    col = place[2] + AHEAD[2] * COLS
    row = tl.where(col < end[2], place[1], place[1] + AHEAD[1] * ROWS)
    outer = tl.where(row < end[1], place[0], place[0] + AHEAD[0])
    return outer, tl.where(row < end[1], row, start[1]), tl.where(col < end[2], col, start[2])


@triton.jit
def load_block(ptr, strides, place, end, other, AHEAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return a pair for each tile of a block: its elements, and which of them exist.

    Args:
        ptr: outer × rows × cols, by ``strides``.
        strides: along (outer, rows, cols).
        place: where the block begins; beyond the share nothing is read.
        end: of the share along (outer, rows, cols).
        other: what elements from there on are; in the tensor's dtype, broadcasts against a tile.
        AHEAD: tiles of the block along (outer, rows, cols).
        ROWS: of a tile.
        COLS: of a tile.
    """
    OUTER: tl.constexpr = AHEAD[0]
    DOWN: tl.constexpr = AHEAD[1]
    ALONG: tl.constexpr = AHEAD[2]
    tiles = ()
    for o in tl.static_range(OUTER):
        for r in tl.static_range(DOWN):
            for c in tl.static_range(ALONG):
                at, mask = share_tile(place[0] + o, place[1] + r * ROWS, place[2] + c * COLS, end, ROWS, COLS)
                mask = mask & (at[0] < end[0])
                x = tl.load(ptr + share_offsets(at, strides), mask=mask, other=other)
                tiles = tiles + ((x, mask),)  # type: ignore[assignment]  # noqa: RUF005 -- Triton knows no starred elements
    return tiles


@triton.jit
def partial_tile(start, channel, valid, splits, channels, SPLITS: tl.constexpr):
    """Return offsets of SPLITS partial results of some channels, from number ``start`` on, and which of them exist."""
    part = start + tl.arange(0, SPLITS)[:, None]
    return part * channels + channel[None, :], (part < splits) & valid[None, :]


@triton.jit
def spread(vector, CHANNEL: tl.constexpr):
    """Return a vector over the channels of a share, shaped to broadcast against a tile."""
    if CHANNEL == 2:
        return vector[None, :]
    else:
        return vector[:, None]


@triton.jit
def sum_per_channel(tile, CHANNEL: tl.constexpr):
    """Return the sums of a tile, shaped as the channels of its share."""
    if CHANNEL == 1:
        return tl.sum(tile, 1)
    elif CHANNEL == 2:
        return tl.sum(tile, 0)
    else:
        return tl.sum(tl.sum(tile, 1), 0, keep_dims=True)


@triton.jit
def min_per_channel(tile, CHANNEL: tl.constexpr):
    """Return the smallest of a tile, shaped as the channels of its share; NaN may be lost."""
    if CHANNEL == 1:
        return tl.min(tile, 1)
    elif CHANNEL == 2:
        return tl.min(tile, 0)
    else:
        return tl.min(tl.min(tile, 1), 0, keep_dims=True)


@triton.jit
def max_per_channel(tile, CHANNEL: tl.constexpr):
    """Return the largest of a tile, shaped as the channels of its share; NaN may be lost."""
    if CHANNEL == 1:
        return tl.max(tile, 1)
    elif CHANNEL == 2:
        return tl.max(tile, 0)
    else:
        return tl.max(tl.max(tile, 1), 0, keep_dims=True)


@triton.jit
def fma(x, factor, addend):
    """Return ``x · factor + addend`` with one rounding (two in the interpreter).

    The last two broadcast against ``x``.
    """
    return tl.fma(x, tl.broadcast_to(factor, x.shape), tl.broadcast_to(addend, x.shape))
