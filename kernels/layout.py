"""How kernels see a tensor: three dimensions (outer, rows, cols) by strides, never by copying where strides allow.

Plain integers in, plain integers out, so that sizes beyond any memory can be checked without allocating.
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


class View(NamedTuple):
    """Up to three dimensions that address every element of one or more tensors of one shape.

    Attributes:
        sizes: (outer, rows, cols); unused leading dimensions are 1.
        strides: one (outer, row, col) triple per tensor, in elements.
        channel: index into ``sizes`` of the dimension that carries the channels, or None.
        wide: some index or offset may pass 2^31, so that kernels compute them in 64 bits.
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
        """Whether one offset addresses an element in every tensor."""
        return all(triple == self.strides[0] for triple in self.strides)

    @property
    def channels(self) -> int:
        """Number of channels; 1 without a channel dimension."""
        return 1 if self.channel is None else self.sizes[self.channel]

    @property
    def alignment(self) -> int:
        """Power of two up to 8 that rows and their starts are multiples of; 1 where a compiler knows more by itself."""
        steps = [step for triple in self.strides for step in triple[:2]]
        common = math.gcd(self.sizes[2], *steps)
        if common % _KNOWN_ALIGNMENT == 0 or any(triple[2] != 1 for triple in self.strides):
            return 1
        return common & -common

    def constants(self, tile: Tile, grid: LaunchGrid) -> dict[str, Any]:
        """Return the constants of a kernel that takes one tile of this view at a time, and its options."""
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
    """The part of a view that one program works on.

    Attributes:
        rows: a power of two.
        cols: a power of two.
        warps: groups of lanes that share the tile, Triton's ``num_warps``.
    """

    rows: int
    cols: int
    warps: int


class LaunchGrid(NamedTuple):
    """How many programs a launch has.

    Attributes:
        programs: along each axis.
        first: the dimension of the view along the first axis, whose length GPUs don't limit.
    """

    programs: tuple[int, int, int]
    first: int


@lru_cache(maxsize=4096)
def view(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], axis: int | None) -> View | None:
    """Fold ``shape`` into at most three dimensions on which every tensor has one stride each.

    Dimensions are ordered by the stride of the last tensor (the output), so that a dense tensor becomes one dimension
    in memory order, whatever its memory format. Neighbours merge where all tensors allow it; the channel axis never
    merges. A contiguous (N, C, H, W) with axis 1 gives (N, C, H*W), channels_last gives (1, N*H*W, C). Dimensions of an
    empty tensor merge whatever their strides.

    Args:
        shape: the common shape.
        strides: strides of each tensor, in elements; the output's last.
        axis: the channel axis (may be negative), or None.

    Returns:
        The view, or None where more than three dimensions remain: some tensor must be copied first.
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
    """Whether indices or offsets up to ``extent``, and those of lanes beyond, need 64 bits."""
    return extent >= _WIDE_EXTENT


def dense_view(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], axis: int | None) -> View:
    """Compute :func:`view` of tensors that share a dense layout: at most three dimensions around the channel axis.

    Raises:
        ValueError: strides that differ, or leave gaps where they can't be folded.
    """
    seen = view(shape, strides, axis)
    if seen is None:
        raise ValueError(f"a tensor of shape {shape} with strides {strides} is not dense")
    return seen


def _extent(sizes: tuple[int, int, int], strides: Sequence[tuple[int, int, int]]) -> int:
    """Return the largest index or offset that addressing the view can produce."""
    offsets = [sum((size - 1) * step for size, step in zip(sizes, t, strict=True)) for t in strides]
    return max(*sizes, *offsets)


def tile_shape(sizes: tuple[int, int, int], elements: int, max_cols: int) -> tuple[int, int]:
    """Return rows and columns of a tile of about ``elements`` elements: as wide as padding allows, then as tall.

    Args:
        sizes: (outer, rows, cols) of the view.
        elements: elements per tile, a power of two.
        max_cols: widest tile to consider, a power of two. Narrow tiles suit channels along the columns: each program
            then computes few reciprocal scales and uses each for many rows.
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
    """Return columns on the first grid axis, rows on the second, outer on the third.

    Where rows or outer pass the limit of their axis they trade places with the columns. (A second dimension cannot pass
    it as well: that would take over 2^32 tiles of a thousand elements.)

    Args:
        programs: numbers of programs along (outer, rows, cols).

    Raises:
        ValueError: two dimensions pass the limit.
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
    """Return tiles of (1, rows, cols) along each dimension."""
    return sizes[0], -(-sizes[1] // rows), -(-sizes[2] // cols)


class Split(NamedTuple):
    """How a reduction is shared out among programs, along (outer, rows, cols).

    Attributes:
        share: elements of one program.
        programs: how many programs there are.
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
    """Cut a reduction over all dimensions but ``channel`` into programs of whole tiles.

    Args:
        sizes: (outer, rows, cols).
        channel: the dimension that is kept; each program takes one tile of it.
        tile: tile size along each dimension (1 along outer).
        target_programs: how many programs fill the device.
        min_elements: a program with fewer elements than this is not worth a second partial result.
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
    """Return the smallest power of two that is at least ``n`` and 1."""
    return 1 << max(0, n - 1).bit_length()


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
