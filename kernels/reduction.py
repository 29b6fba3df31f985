"""Reductions over all dimensions but the channels: how programs divide the work, and what joins their results.

A program reads one *share* of an (outer, rows, cols) view, a box of whole tiles, and stores one partial result per
channel. A second, small kernel joins the partial results in the order of their numbers. The device functions are in
`tritonq.kernels.channel_tiles`. `tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .launch_sizes import parameters, planned, programs_that_fill, warp_size
from .layout import LaunchGrid, Tile, View, dense_view, is_wide, launch_grid, split, tile_shape, view

# Eight elements per lane: the compiler unrolls the loop itself, with loads in flight and 52 registers at most. Larger
# tiles made it spill (perf/codegen.py).
_MAX_BYTES = 2048
# With four programs of 128 lanes to a multiprocessor, four tiles are 32 KiB of 16-bit elements in flight: Little's law
# asks for 21 on an H200 (perf/PREDICTIONS.md).
TILES_AHEAD = 4
# A program that reads less than this costs more than its partial result saves. By loads in flight, not measured.
_MIN_ELEMENTS_PER_PROGRAM = 8192
# Partial results that one program of the second kernel holds at a time, and their channels: eight fill the 32 bytes
# that memory hands out at least, and fewer channels make more programs.
_JOINED_ELEMENTS = 2048
_JOINED_CHANNELS = 8


class Reduction(NamedTuple):
    """How programs divide a reduction.

    Attributes:
        view: the tensor's three dimensions (outer, rows, cols), and which of them holds the channels.
        tile: rows and columns that a program reads at a time, and its number of warps.
        share: elements that a program takes along (outer, rows, cols): whole tiles.
        grid: launch of the first kernel: its programs along the axes of the launch, and the dimension on axis 0.
        split_strides: factors of a program's numbers along (outer, rows, cols), 0 for the channels; the sum of products
            is the number of its partial result.
        splits: partial results per channel.
    """

    view: View
    tile: Tile
    share: tuple[int, int, int]
    grid: LaunchGrid
    split_strides: tuple[int, int, int]
    splits: int

    @property
    def channels(self) -> int:
        """Number of channels; 1 without a channel axis, or with one of length 1."""
        return self.view.channels

    @property
    def arguments(self) -> tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int], int, int]:
        """The arguments ``sizes, share, split_strides, splits, channels`` of the first kernel."""
        return self.view.sizes, self.share, self.split_strides, self.splits, self.channels

    def ahead(self, reads: int = 1) -> tuple[int, int, int]:
        """Return how many tiles along (outer, rows, cols) a program loads at a time: a *block*.

        The product is ``4 // reads`` at most, 1 at least, with ``reads`` the number of tensors that the kernel reads.
        The counts are powers of two. Each begins at 1, and is doubled while the product allows it and so many tiles fit
        into the share: first that of cols, then that of rows, then that of outer.
        """
        room, ahead = TILES_AHEAD // reads, [1, 1, 1]
        for d, step in ((2, self.tile.cols), (1, self.tile.rows), (0, 1)):
            while room > 1 and 2 * ahead[d] * step <= self.share[d]:
                ahead[d], room = 2 * ahead[d], room // 2
        return ahead[0], ahead[1], ahead[2]

    def blocks(self, reads: int = 1) -> int:
        """Return how many blocks of :meth:`ahead` tiles a share has; 0 for an empty tensor.

        ``reads`` is the number of tensors that the kernel reads.
        """
        if 0 in self.view.sizes:
            return 0
        steps = zip(self.share, self.ahead(reads), (1, self.tile.rows, self.tile.cols), strict=True)
        return math.prod(triton.cdiv(size, ahead * step) for size, ahead, step in steps)

    @property
    def constants(self) -> dict[str, Any]:
        """Constants and launch options of the first kernel, as keyword arguments.

        They are CHANNEL, WIDE, ROWS, COLS, FIRST of `tritonq.kernels`, ``num_warps`` and ``enable_fp_fusion=False``.
        """
        return self.view.constants(self.tile, self.grid)

    def partial(self, results: int, device: torch.device) -> Tensor:
        """Return uninitialised memory for partial results: float32 (results, splits, channels).

        Args:
            results: how many numbers a share gives per channel: 2 for minimum and maximum.
            device: where the memory is.
        """
        return torch.empty((results, self.splits, self.channels), dtype=torch.float32, device=device)

    @property
    def joining_programs(self) -> tuple[int]:
        """The launch grid of the second kernel, ``(ceil(channels / CHANNELS),)``.

        Each program joins the partial results of CHANNELS channels, a number in :attr:`joining_constants`.
        """
        return (triton.cdiv(self.channels, self.joining_constants["CHANNELS"]),)

    @property
    def joining_constants(self) -> dict[str, Any]:
        """Constants and launch options of the second kernel, as keyword arguments.

        They are SPLITS and CHANNELS, powers of two (how many partial results of how many channels a program holds at a
        time), ``num_warps`` and ``enable_fp_fusion=False``.
        """
        channels = min(triton.next_power_of_2(self.channels), _JOINED_CHANNELS)
        return {
            "SPLITS": min(triton.next_power_of_2(self.splits), _JOINED_ELEMENTS // channels),
            "CHANNELS": channels,
            "num_warps": 4,
            "enable_fp_fusion": False,
        }


def viewed(x: Tensor, axis: int | None) -> tuple[Tensor, View]:
    """Return ``x`` and its view; if the strides of ``x`` allow no view, a contiguous copy and the view of that.

    ``axis`` is that of the channels, and may be negative; None: the whole tensor is reduced to one result.
    """
    seen = view(x.shape, (x.stride(),), axis)
    if seen is not None:
        return x, seen
    x = x.contiguous()
    return x, dense_view(x.shape, (x.stride(),), axis)


def plan_reduction(x: Tensor, seen: View) -> Reduction:
    """Return how a reduction of ``x`` is divided among programs: as many as fill the device, fewer for a small tensor.

    ``seen`` is the view of ``x`` from :func:`viewed`. Nothing else of ``x`` is read but its dtype and its device.
    """
    shares: Reduction = planned_reduction(x.dtype, seen, x.device, warp_size(x.device))
    return shares


@planned("min_max")
def planned_reduction(dtype: torch.dtype, seen: View, device: torch.device, warp_size: int) -> Reduction:
    """Return, from a cache, how a reduction of a tensor with this dtype, view and device is divided among programs.

    ``seen`` is the view of the tensor, ``warp_size`` the device's lanes per warp.
    """
    chosen = parameters("min_max", dtype, seen, device)
    rows, cols = tile_shape(seen.sizes, min(chosen.elements, _MAX_BYTES // dtype.itemsize), chosen.max_cols)
    parts = split(seen.sizes, seen.channel, (1, rows, cols), programs_that_fill(device), _MIN_ELEMENTS_PER_PROGRAM)
    strides, splits = [0, 0, 0], 1
    for d in (2, 1, 0):
        if d != seen.channel:
            strides[d] = splits
            splits *= parts.programs[d]
    tile = Tile(rows, cols, chosen.num_warps(warp_size))
    # The end of the last share lies beyond the tensor.
    ends = max(share * programs for share, programs in zip(parts.share, parts.programs, strict=True))
    seen = seen._replace(wide=seen.wide or is_wide(ends))
    return Reduction(seen, tile, parts.share, launch_grid(parts.programs), (strides[0], strides[1], strides[2]), splits)
