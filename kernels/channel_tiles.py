"""Device functions for reductions over all dimensions but the channels, and for tiles with per-channel vectors.

The launch divides an (outer, rows, cols) view into shares (`tritonq.kernels.reduction`). A *share* is the box of
elements that one program reads, tile by tile; a *place* is the triple (outer, row, col) of a tile or of its elements.
Each program stores one partial result per channel under the number of its *split*: programs with the same channels and
different splits are joined later. CHANNEL is the dimension of the view with the channels, or None. `tritonq.kernels`
explains the constants that have no comment.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import program_along


@triton.jit
def share_bounds(sizes, share, split_strides, FIRST: tl.constexpr, WIDE: tl.constexpr):
    """Return ``(start, end, split)``: the two corners of this program's share, and the number of its split.

    Args:
        sizes: (outer, rows, cols) of the view; ``end`` does not pass them.
        share: elements of one program along each dimension, whole tiles.
        split_strides: factors of the program numbers along each dimension; their sum of products is the split's number.
        FIRST: dimension of the view on axis 0 of the launch. With 2 (columns) rows are on axis 1 and outer on axis 2;
            with 0 or 1 that dimension and the columns trade places.
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
    """Return the numbers of the channels of a share, and a mask of those below ``channels``.

    Both are vectors: of ROWS elements if the channels lie along rows (CHANNEL 1), of COLS along columns (2), else of
    one element, which is the share's outer index (CHANNEL 0) or channel 0 (None). ``start`` is the first corner of the
    share, (outer, row, col).
    """
    if CHANNEL == 1:
        channel = start[1] + tl.arange(0, ROWS)
    elif CHANNEL == 2:
        channel = start[2] + tl.arange(0, COLS)
    else:
        channel = (start[0] if CHANNEL == 0 else 0) + tl.arange(0, 1)
    return channel, channel < channels


@triton.jit
def share_tile(outer, row_start, col_start, sizes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return ``(outer, row, col)`` of a tile's elements, and a (ROWS, COLS) mask of those inside ``sizes``.

    ``row`` is (ROWS, 1) from ``row_start`` on, ``col`` is (1, COLS) from ``col_start`` on; ``outer`` stays a scalar.
    ``sizes`` is (outer, rows, cols), of the view or the end of the share; its first number is not checked.
    """
    row = row_start + tl.arange(0, ROWS)[:, None]
    col = col_start + tl.arange(0, COLS)[None, :]
    return (outer, row, col), (row < sizes[1]) & (col < sizes[2])


@triton.jit
def load_tile(
    ptr, strides, outer, row_start, col_start, end, other, ROWS: tl.constexpr, COLS: tl.constexpr, SKEW: tl.constexpr
):
    """Load one tile of a share; return its elements, and a mask of those that exist.

    Args:
        ptr: outer × rows × cols, by ``strides``.
        strides: along (outer, rows, cols).
        outer: index of the tile along the first dimension.
        row_start: first row of the tile.
        col_start: first column of the tile; 0 with a SKEW above 1.
        end: of the share along (outer, rows, cols).
        other: value of elements that do not exist; in the tensor's dtype, broadcasts against a tile.
        ROWS: of the tile.
        COLS: of the tile; with a SKEW above 1 at least a row's elements and SKEW - 1 more.
        SKEW: elements to read at a time of rows that begin anywhere in memory; each row of the tile then begins at the
            multiple of SKEW before the row, and elements of neighbouring rows around it do not exist. 1: rows are read
            as they are.
    """
    if SKEW == 1:
        at, mask = share_tile(outer, row_start, col_start, end, ROWS, COLS)
        mask = mask & (outer < end[0])
        x = tl.load(ptr + share_offsets(at, strides), mask=mask, other=other)
    else:
        row = row_start + tl.arange(0, ROWS)[:, None]
        lane = tl.arange(0, COLS)[None, :]
        first = row * strides[1]
        ahead = first % SKEW
        exists = (row < end[1]) & (outer < end[0])
        mask = exists & (lane >= ahead) & (lane < ahead + end[2])
        # The compiler reads SKEW elements at a time where their mask is one, and offsets are multiples that it knows.
        begin = outer * (strides[0] // SKEW * SKEW) + first // SKEW * SKEW
        x = tl.load(ptr + begin + lane, mask=exists & (lane // SKEW * SKEW < ahead + end[2]), other=other)
        x = tl.where(mask, x, other)
    return x, mask


@triton.jit
def share_offsets(place, strides):
    """Return ``outer · strides[0] + row · strides[1] + col · strides[2]`` for a ``place`` of :func:`share_tile`."""
    return place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2]


@triton.jit
def next_block(place, start, end, AHEAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SKEW: tl.constexpr = 1):
    """Return the place (outer, row, col) of the block after the one at ``place``: columns first, then rows, then outer.

    A block is AHEAD[0] × AHEAD[1] × AHEAD[2] tiles of (1, ROWS, COLS); ``start`` and ``end`` are those of the share,
    (outer, row, col) each. After the last block outer is ``end[0]`` or more, so that loads there are masked; row and
    col are those of ``start`` again. With a SKEW above 1 (rows begin anywhere, and are read from a multiple of SKEW
    before them) a share has one tile along rows and columns, and outer alone advances.
    """
    if SKEW != 1:
        return place[0] + AHEAD[0], start[1], start[2]
    col = place[2] + AHEAD[2] * COLS
    row = tl.where(col < end[2], place[1], place[1] + AHEAD[1] * ROWS)
    outer = tl.where(row < end[1], place[0], place[0] + AHEAD[0])
    return outer, tl.where(row < end[1], row, start[1]), tl.where(col < end[2], col, start[2])


@triton.jit
def load_block(
    ptr,
    strides,
    place,
    end,
    other,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SKEW: tl.constexpr = 1,
):
    """Load a block of tiles and return a tuple of pairs, one per tile: its elements, and a mask of those that exist.

    The tiles come in the order of the view: first those along cols, then the next rows, then the next outer index.

    Args:
        ptr: outer × rows × cols, by ``strides``.
        strides: along (outer, rows, cols).
        place: (outer, row, col) where the block begins; beyond the share nothing is read.
        end: of the share along (outer, rows, cols).
        other: value of elements that don't exist; in the tensor's dtype, broadcasts against a tile.
        AHEAD: tiles of the block along (outer, rows, cols).
        ROWS: rows of a tile.
        COLS: columns of a tile.
        SKEW: elements to read at a time of rows that begin anywhere, as in :func:`load_tile`. 1: rows are read as they
            are.
    """
    OUTER: tl.constexpr = AHEAD[0]
    DOWN: tl.constexpr = AHEAD[1]
    ALONG: tl.constexpr = AHEAD[2]
    tiles = ()
    for o in tl.static_range(OUTER):
        for r in tl.static_range(DOWN):
            for c in tl.static_range(ALONG):
                tile = load_tile(
                    ptr, strides, place[0] + o, place[1] + r * ROWS, place[2] + c * COLS, end, other, ROWS, COLS, SKEW
                )
                tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005 -- Triton knows no starred elements
    return tiles


@triton.jit
def partial_tile(start, channel, valid, splits, channels, SPLITS: tl.constexpr):
    """Return offsets and mask, (SPLITS, channels of this program), of SPLITS partial results of each channel.

    The offset of split p and channel k is ``p · channels + k``, with p from ``start`` on; the mask leaves out splits
    from ``splits`` on and channels that do not exist.

    Args:
        start: number of the first split to read.
        channel: channel numbers of this program.
        valid: which of them exist.
        splits: partial results per channel.
        channels: channels in all.
        SPLITS: partial results to read at a time.
    """
    part = start + tl.arange(0, SPLITS)[:, None]
    return part * channels + channel[None, :], (part < splits) & valid[None, :]


@triton.jit
def spread(vector, CHANNEL: tl.constexpr):
    """Return a vector over a share's channels as (1, COLS) if CHANNEL is 2, (ROWS, 1) if it is 1, else (1, 1)."""
    if CHANNEL == 2:
        return vector[None, :]
    else:
        return vector[:, None]


@triton.jit
def sum_per_channel(tile, CHANNEL: tl.constexpr):
    """Return the sums of a (ROWS, COLS) tile per channel: (ROWS,) if CHANNEL is 1, (COLS,) if 2, else (1,)."""
    if CHANNEL == 1:
        return tl.sum(tile, 1)
    elif CHANNEL == 2:
        return tl.sum(tile, 0)
    else:
        return tl.sum(tl.sum(tile, 1), 0, keep_dims=True)


@triton.jit
def min_per_channel(tile, CHANNEL: tl.constexpr):
    """Return a tile's smallest value per channel: (ROWS,) if CHANNEL is 1, (COLS,) if 2, else (1,); NaN may be lost."""
    if CHANNEL == 1:
        return tl.min(tile, 1)
    elif CHANNEL == 2:
        return tl.min(tile, 0)
    else:
        return tl.min(tl.min(tile, 1), 0, keep_dims=True)


@triton.jit
def max_per_channel(tile, CHANNEL: tl.constexpr):
    """Return a tile's largest value per channel: (ROWS,) if CHANNEL is 1, (COLS,) if 2, else (1,); NaN may be lost."""
    if CHANNEL == 1:
        return tl.max(tile, 1)
    elif CHANNEL == 2:
        return tl.max(tile, 0)
    else:
        return tl.max(tl.max(tile, 1), 0, keep_dims=True)


@triton.jit
def fma(x, factor, addend):
    """Return ``x · factor + addend`` with one rounding (two in the interpreter); both broadcast against ``x``."""
    return tl.fma(x, tl.broadcast_to(factor, x.shape), tl.broadcast_to(addend, x.shape))
