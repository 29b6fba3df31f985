"""How kernels see a tensor: as three dimensions (outer, rows, cols) with strides.

A tensor is copied only if its strides don't allow such a view. Functions take plain integers (shapes and strides, in
elements) and return plain integers, so that sizes beyond any memory can be tested without allocating.

Memory is read fast if each access begins at a multiple of several elements. *Short rows*, such as the 49 elements of a
7 × 7 image, lie one behind the other and hold a channel each; their length is no multiple of 4, so that they begin
anywhere. Kernels read them from the last such multiple before the row on: that shift is the *skew* of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

# Index arithmetic stays 32-bit below this extent; the slack covers the masked lanes of a last, partial tile or block.
_WIDE_EXTENT = 2**31 - 2**20
# CUDA's and HIP's limit on the second and third grid axis. The first one takes 2^31 - 1.
_GRID_LIMIT = 65535
# Padding a row to whole tiles may waste this share of the lanes before a narrower tile is tried.
_MAX_PADDING = 1.15
# Narrower tiles than this many columns no longer read whole 128-byte lines.
_MIN_COLS = 32
# What integers are multiples of the compiler finds out itself for this one. Accesses take up to half as many elements.
_KNOWN_ALIGNMENT = 16
# Elements that a lane takes at a time where rows begin anywhere: 16 bytes of 16-bit elements, or 8.
_AT_A_TIME = (8, 4)
_FEWEST_AT_A_TIME = _AT_A_TIME[-1]


class View(NamedTuple):
    """Three dimensions (outer, rows, cols) that address every element of one or more tensors of one shape.

    Attributes:
        sizes: (outer, rows, cols); unused leading dimensions are 1.
        strides: one (outer, row, col) triple per tensor, in elements.
        channel: index into ``sizes`` of the dimension with the channels; None: no channel axis, or one of length 1.
        wide: whether an index or offset may pass 2^31, so that kernels compute them in 64 bits.
    """

    sizes: tuple[int, int, int]
    strides: tuple[tuple[int, int, int], ...]
    channel: int | None
    wide: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.sizes[0] * self.sizes[1] * self.sizes[2]

    @property
    def same_strides(self) -> bool:
        """Whether all tensors have the same strides, so that one offset addresses an element in each of them."""
        return all(triple == self.strides[0] for triple in self.strides)

    @property
    def channels(self) -> int:
        """Number of channels; 1 without a channel dimension."""
        return 1 if self.channel is None else self.sizes[self.channel]

    @property
    def alignment(self) -> int:
        """Largest power of two, up to 8, that divides the number of columns and all strides of outer and rows.

        1 if a tensor's columns are not contiguous, or if all these numbers are multiples of 16, which Triton's compiler
        finds out by itself.
        """
        steps = [step for triple in self.strides for step in triple[:2]]
        common = math.gcd(self.sizes[2], *steps)
        if common % _KNOWN_ALIGNMENT == 0 or any(triple[2] != 1 for triple in self.strides):
            return 1
        return common & -common

    @property
    def lies_row_by_row(self) -> bool:
        """Whether rows are short ones, so that they begin anywhere in memory.

        That is so if each row is a channel (``channel`` is 1), if in every tensor all rows lie one behind the other
        without gaps, and if their length, however large, is no multiple of 4.
        """
        _, rows, cols = self.sizes
        dense = all(triple[1:] == (cols, 1) for triple in self.strides)
        planes = all(triple[0] == rows * cols for triple in self.strides) or self.sizes[0] == 1
        return self.channel == 1 and dense and planes and cols % _FEWEST_AT_A_TIME != 0

    def skew(self, width: int) -> int:
        """Return how many elements kernels read at a time from short rows: 8 or 4; 1 if rows are not short.

        A tile of ``width`` columns then begins at a multiple of that number and so up to 7 or 3 elements before its
        row. 1, too, if the row and these elements do not fit into the tile, or if no such number divides a plane
        (rows · cols). For 64 rows of 49 elements: 8 with tiles of 64 columns, 1 with tiles of 32.
        """
        _, rows, cols = self.sizes
        fitting = (n for n in _AT_A_TIME if rows * cols % n == 0 and cols + n - 1 <= width)
        return next(fitting, 1) if self.lies_row_by_row else 1

    def pieces(self) -> tuple[View, int | None]:
        """Cut short rows into pieces of n elements; return the view of pieces, and how many elements a short row has.

        The view of pieces has the sizes (outer, rows · cols / n, n) and the same ``channel``, so that its ``channels``
        counts pieces. A piece has elements of two channels at most. n is 8 if 8 divides a plane (rows · cols) and cols
        is 7 or more; else 4 if 4 divides a plane and cols is 3 or more. Returns the view itself and None if neither
        holds, or if rows are not short (:attr:`lies_row_by_row`).
        """
        outer, rows, cols = self.sizes
        fitting = (n for n in _AT_A_TIME if rows * cols % n == 0 and cols >= n - 1)
        piece = next(fitting, None) if self.lies_row_by_row else None
        if piece is None:
            return self, None
        strides = tuple((triple[0], piece, 1) for triple in self.strides)
        return self._replace(sizes=(outer, rows * cols // piece, piece), strides=strides), cols

    def constants(self, tile: Tile, grid: LaunchGrid) -> dict[str, Any]:
        """Return the constants and launch options that kernels on this view take, as keyword arguments.

        They are CHANNEL and WIDE (``channel`` and ``wide`` of the view), ROWS and COLS (of ``tile``), FIRST (the view's
        dimension on the first axis of the launch, from ``grid``), ``num_warps`` (of ``tile``), and
        ``enable_fp_fusion=False``: the compiler must not fuse a product with the addition behind it, which would round
        once instead of twice.

        Args:
            tile: what a program reads at a time.
            grid: how many programs the launch has: one per tile, or fewer in a reduction.
        """
        return {
            "CHANNEL": self.channel,
            "ROWS": tile.rows,
            "COLS": tile.cols,
            "FIRST": grid.first,
            "WIDE": self.wide,
            "num_warps": tile.warps,
            "enable_fp_fusion": False,
        }


class Tile(NamedTuple):
    """The part of a view that one program works on at a time.

    Attributes:
        rows: a power of two.
        cols: a power of two.
        warps: warps of the program, Triton's ``num_warps``.
    """

    rows: int
    cols: int
    warps: int


class LaunchGrid(NamedTuple):
    """How many programs a launch has along each axis.

    Attributes:
        programs: along axes 0, 1 and 2 of the launch.
        first: the dimension of the view on axis 0, the only one that may have more than 65535 programs. With 2
            (columns) rows are on axis 1 and outer on axis 2; with 0 or 1 that dimension and the columns trade places.
    """

    programs: tuple[int, int, int]
    first: int


@lru_cache(maxsize=4096)
def view(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], axis: int | None) -> View | None:
    """Merge the dimensions of tensors of one shape into at most three, on which each tensor has one stride.

    Dimensions are ordered by the stride of the last tensor (the output), so that a dense tensor becomes one dimension
    in memory order, whatever its memory format. Neighbours merge where all tensors allow it; the channel axis never
    merges. A contiguous (N, C, H, W) with axis 1 gives (N, C, H*W), channels_last gives (1, N*H*W, C). Dimensions of an
    empty tensor merge whatever their strides.

    Args:
        shape: the common shape.
        strides: strides of each tensor, in elements; the output's last.
        axis: the channel axis (may be negative), or None.

    Returns:
        The view; None if more than three dimensions remain, so that some tensor must be copied first.
    """
    axis = None if axis is None else axis % len(shape)
    order = [d for d in range(len(shape)) if shape[d] != 1]
    order.sort(key=lambda d: -strides[-1][d])
    folded: list[tuple[int, tuple[int, ...], bool]] = []
    for d in order:
        size, step, is_channel = shape[d], tuple(s[d] for s in strides), d == axis
        if folded and not is_channel and not folded[-1][2]:
            above_size, above_step, _ = folded[-1]
            if 0 in shape or all(above == here * size for above, here in zip(above_step, step, strict=True)):
                folded[-1] = (above_size * size, step, False)
                continue
        folded.append((size, step, is_channel))
    if len(folded) > 3:
        return None
    folded = [(1, (0,) * len(strides), False)] * (3 - len(folded)) + folded
    sizes = (folded[0][0], folded[1][0], folded[2][0])
    triples = tuple((folded[0][1][t], folded[1][1][t], folded[2][1][t]) for t in range(len(strides)))
    channel = next((i for i, dimension in enumerate(folded) if dimension[2]), None)
    return View(sizes, triples, channel, is_wide(_extent(sizes, triples)))


def is_wide(extent: int) -> bool:
    """Whether offsets up to ``extent`` (in elements) need 64 bits: from 2^31 - 2^20 on.

    The 2^20 elements below 2^31 are a margin for lanes past the end.
    """
    return extent >= _WIDE_EXTENT


def dense_view(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], axis: int | None) -> View:
    """Return the :func:`view` of tensors with equal strides that leave no gaps; there always is one.

    Args:
        shape: of the tensors.
        strides: of each tensor.
        axis: the axis with the channels; None: there is one channel.

    Raises:
        ValueError: there is no such view, since the strides differ, or leave gaps.
    """
    seen = view(shape, strides, axis)
    if seen is None:
        raise ValueError(f"a tensor of shape {shape} with strides {strides} is not dense")
    return seen


def _extent(sizes: tuple[int, int, int], strides: Sequence[tuple[int, int, int]]) -> int:
    """Return the largest index or offset, in elements, that occurs when the view's elements are addressed."""
    offsets = [sum((size - 1) * step for size, step in zip(sizes, t, strict=True)) for t in strides]
    return max(*sizes, *offsets)


def tile_shape(sizes: tuple[int, int, int], elements: int, max_cols: int) -> tuple[int, int]:
    """Return rows and columns of a tile of at most ``elements`` elements, both powers of two; columns are chosen first.

    The number of columns is the largest power of two from 32 to ``max_cols`` that pads a row by at most 15 %. If there
    is none, it is the one that pads least, of several the largest. Powers beyond the first that holds a whole row do
    not count; a row of 16 elements or fewer gets that first one. There are as many rows as ``elements`` allows, but not
    more than the first power of two that holds all rows of the view.

    ``(1, 1, 5000)`` with 4096 elements gives a tile of 1 × 1024: five of them pad 5000 columns by 2 %.

    Args:
        sizes: (outer, rows, cols) of the view.
        elements: most elements per tile, a power of two.
        max_cols: widest tile to consider, a power of two. If channels lie along the columns, narrow tiles are better:
            each program computes few reciprocal scales and uses each for many rows.
    """
    _, rows, cols = sizes
    widest = min(_power_of_two(cols), max_cols, elements)
    best, width = widest, widest
    while width >= _MIN_COLS:
        if _padded(cols, width) <= _MAX_PADDING * cols:
            best = width
            break
        if _padded(cols, width) < _padded(cols, best):
            best = width
        width //= 2
    return min(_power_of_two(rows), elements // best), best


def launch_grid(programs: tuple[int, int, int]) -> LaunchGrid:
    """Return the launch for numbers of programs along (outer, rows, cols): columns on axis 0, rows on 1, outer on 2.

    Axes 1 and 2 take 65535 programs at most. If rows or outer have more, they trade places with the columns, and
    ``first`` says so.

    Args:
        programs: numbers of programs along (outer, rows, cols).

    Raises:
        ValueError: two dimensions have more than 65535 programs, over 2^32 in all.
    """
    first = 2
    if max(programs[0], programs[1]) > _GRID_LIMIT:
        first = 0 if programs[0] > programs[1] else 1
    axes = [programs[2], programs[1], programs[0]]
    axes[0], axes[2 - first] = axes[2 - first], axes[0]
    if max(axes[1], axes[2]) > _GRID_LIMIT:
        raise ValueError(f"a launch takes at most {_GRID_LIMIT} programs on its later axes, got {programs}")
    return LaunchGrid((axes[0], axes[1], axes[2]), first)


def tile_counts(sizes: tuple[int, int, int], rows: int, cols: int) -> tuple[int, int, int]:
    """Return how many tiles of (1, rows, cols) cover a view along each of its dimensions."""
    return sizes[0], -(-sizes[1] // rows), -(-sizes[2] // cols)


class Split(NamedTuple):
    """How a reduction is divided among programs, along (outer, rows, cols).

    Attributes:
        share: elements of one program along each dimension, whole tiles.
        programs: how many programs there are along each dimension.
    """

    share: tuple[int, int, int]
    programs: tuple[int, int, int]


def split(
    sizes: tuple[int, int, int],
    channel: int | None,
    tile: tuple[int, int, int],
    target_programs: int,
    min_elements: int,
) -> Split:
    """Divide a reduction over all dimensions but ``channel`` among programs; return how they share it.

    That is, along each dimension, the size of a program's part and the number of programs.

    Args:
        sizes: (outer, rows, cols).
        channel: index into ``sizes`` of the dimension that is not reduced; each program takes one tile of it. None: all
            are reduced.
        tile: tile size along each dimension (1 along outer).
        target_programs: how many programs fill the device. No more are made, unless ``channel`` alone has more tiles.
        min_elements: fewest elements that are worth another program and its partial result.
    """
    tiles = [-(-size // step) for size, step in zip(sizes, tile, strict=True)]
    kept = 1 if channel is None else tiles[channel]
    numel = sizes[0] * sizes[1] * sizes[2]
    wanted = max(1, min(target_programs // kept, numel // (kept * min_elements)))
    share, programs = [0, 0, 0], [0, 0, 0]
    for d in range(3):
        parts = tiles[d] if d == channel else min(tiles[d], wanted, _GRID_LIMIT)
        share[d] = max(1, -(-tiles[d] // max(1, parts))) * tile[d]
        programs[d] = max(1, -(-sizes[d] // share[d]))
        if d != channel:
            wanted = max(1, wanted // programs[d])
    return Split((share[0], share[1], share[2]), (programs[0], programs[1], programs[2]))


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``; at least 1."""
    return 1 << max(0, n - 1).bit_length()


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
