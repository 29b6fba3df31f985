"""Device functions that find the tile of a program in an (outer, rows, cols) view; see `tritonq.kernels.layout`.

A *place* is the triple (outer, row, col) of a tile's indices: a scalar, (ROWS,) and (COLS,). `tritonq.kernels` explains
the constants that have no comment.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_along(dimension: tl.constexpr, FIRST: tl.constexpr):
    """Return this program's number along a ``dimension`` of the view (0 outer, 1 rows, 2 cols).

    FIRST is the dimension on axis 0 of the launch. With 2 (cols) rows are on axis 1 and outer on axis 2; with 0 or 1
    that dimension and cols trade places.
    """
    if dimension == FIRST:
        return tl.program_id(0)
    elif dimension == 2:
        return tl.program_id(2 - FIRST)
    else:
        return tl.program_id(2 - dimension)


@triton.jit
def tile_indices(
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return this program's indices ``(outer, row, col)``: a scalar, (ROWS,) and (COLS,); 64-bit if WIDE.

    Axes 0, 1 and 2 of the launch run along the dimensions (2, 1, 0) of the view if FIRST is 2, (1, 2, 0) if it is 1,
    and (0, 1, 2) if it is 0.
    """
    outer = program_along(0, FIRST)
    row_tile = program_along(1, FIRST)
    col_tile = program_along(2, FIRST)
    if WIDE:
        outer = outer.to(tl.int64)
        row_tile = row_tile.to(tl.int64)
        col_tile = col_tile.to(tl.int64)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    col = col_tile * COLS + tl.arange(0, COLS)
    return outer, row, col


@triton.jit
def tile_mask(place, sizes, ROWS: tl.constexpr):
    """Return a bool mask, (ROWS, COLS), of the elements of a tile that lie inside the view's ``sizes``.

    Outer indices are not checked, nor rows if ROWS is 1: no program has one beyond the last.
    """
    _, row, col = place
    if ROWS == 1:
        return (col < sizes[2])[None, :]
    else:
        return (row < sizes[1])[:, None] & (col < sizes[2])[None, :]


@triton.jit
def tile_offsets(place, strides):
    """Return the (ROWS, COLS) offsets of a tile's elements in a tensor with ``strides`` (outer, row, col)."""
    outer, row, col = place
    return outer * strides[0] + (row * strides[1])[:, None] + (col * strides[2])[None, :]


@triton.jit
def aligned_strides(strides, ALIGN: tl.constexpr):
    """Return the same strides, written so that Triton's compiler sees that the first two are multiples of ALIGN.

    The caller ensures that they are. By itself the compiler notices multiples of 16 only, and without that reads few
    elements at a time; rows of 14 · 14 elements are multiples of 4.
    """
    return strides[0] // ALIGN * ALIGN, strides[1] // ALIGN * ALIGN, strides[2]


@triton.jit
def aligned_sizes(sizes, ALIGN: tl.constexpr):
    """Return the same sizes, written so that Triton's compiler sees that the last is a multiple of ALIGN.

    The caller ensures that it is.
    """
    return sizes[0], sizes[1], sizes[2] // ALIGN * ALIGN


@triton.jit
def load_per_channel(ptr, place, sizes, CHANNEL: tl.constexpr, RUN: tl.constexpr = None):
    """Load one value per channel of the tile, in the dtype of ``ptr``, shaped to broadcast against the tile.

    The result is (ROWS, 1) with CHANNEL 1, (1, COLS) with 2, else a scalar. With RUN it is one value per element,
    (ROWS, COLS), and CHANNEL is not read. Channels beyond the view count as 1.

    Args:
        ptr: (channels,), or one element if CHANNEL is None.
        place: of the tile, from :func:`tile_indices`.
        sizes: (outer, rows, cols) of the view.
        CHANNEL: dimension of the view with the channels: 0, 1, 2 or None.
        RUN: elements of each channel, where rows are pieces of at most two channels, see `View.pieces`; else None.
    """
    outer, row, col = place
    if RUN is not None:
        begin, exists = row * sizes[2], row < sizes[1]
        last = (begin + sizes[2] - 1) // RUN
        one = tl.load(ptr + begin // RUN, mask=exists, other=1)[:, None]
        other = tl.load(ptr + last, mask=exists, other=1)[:, None]
        return tl.where(begin[:, None] + col[None, :] < (last * RUN)[:, None], one, other)
    elif CHANNEL is None:
        return tl.load(ptr)
    elif CHANNEL == 0:
        return tl.load(ptr + outer)
    elif CHANNEL == 1:
        return tl.load(ptr + row, mask=row < sizes[1], other=1)[:, None]
    else:
        return tl.load(ptr + col, mask=col < sizes[2], other=1)[None, :]
