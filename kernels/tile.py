"""Device functions that place a program on its tile of an (outer, rows, cols) view; see `tritonq.kernels.layout`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_along(dimension: tl.constexpr, FIRST: tl.constexpr):
    """Return this program's number along a dimension of the view (0 outer, 1 rows, 2 cols).

    FIRST lies on grid axis 0.
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
    """Return the place of this program: ``outer`` (scalar), ``row`` (ROWS,), ``col`` (COLS,); 64-bit when WIDE."""
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
    """Return which elements of the tile exist.

    One row per tile needs no row mask: the grid holds no row beyond the last.
    """
    _, row, col = place
    if ROWS == 1:
        return (col < sizes[2])[None, :]
    else:
        return (row < sizes[1])[:, None] & (col < sizes[2])[None, :]


@triton.jit
def tile_offsets(place, strides):
    """Return (ROWS, COLS) offsets of the tile's elements in a tensor of these strides."""
    outer, row, col = place
    return outer * strides[0] + (row * strides[1])[:, None] + (col * strides[2])[None, :]


@triton.jit
def aligned_strides(strides, ALIGN: tl.constexpr):
    """Return strides whose first two the compiler knows to be multiples of ALIGN, which they are.

    It knows by itself of multiples of 16 alone, and of 4 elements at a time reads nothing that may lie anywhere: rows
    of 14 · 14 elements are multiples of 4.
    """
    return strides[0] // ALIGN * ALIGN, strides[1] // ALIGN * ALIGN, strides[2]


@triton.jit
def aligned_sizes(sizes, ALIGN: tl.constexpr):
    """Return sizes whose last the compiler knows to be a multiple of ALIGN, which it is."""
    return sizes[0], sizes[1], sizes[2] // ALIGN * ALIGN


@triton.jit
def load_per_channel(ptr, place, sizes, CHANNEL: tl.constexpr):
    """Return one value per channel of the tile, shaped to broadcast against it.

    Args:
        ptr: (channels,), or one element where CHANNEL is None.
        place: of the tile, from :func:`tile_indices`.
        sizes: (outer, rows, cols) of the view.
        CHANNEL: dimension of the view that carries the channels: 0, 1, 2 or None.
    """
    outer, row, col = place
    if CHANNEL is None:
        return tl.load(ptr)
    elif CHANNEL == 0:
        return tl.load(ptr + outer)
    elif CHANNEL == 1:
        return tl.load(ptr + row, mask=row < sizes[1], other=1)[:, None]
    else:
        return tl.load(ptr + col, mask=col < sizes[2], other=1)[None, :]
