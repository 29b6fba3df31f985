"""`tritonq.reference.fake_quant` in C++: one pass over memory each way, and the reference's bits.

What the compiled code does not take (other dtypes than float32, float codes, ties away from zero, groups) the reference
computes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tritonq.compiled.arguments import are_vectors, is_plain, rounds_to_even_integers
from tritonq.compiled.build import library
from tritonq.grid import Grid
from tritonq.reference import fake_quant as reference
from tritonq.reference.fake_quant import WIDE_CODES, reciprocal
from tritonq.reference.scratch import is_dense

quantize = reference.quantize


class _Channels(NamedTuple):
    """A tensor in memory as (outer, channels, inner), and the grid's scale, its reciprocal and its zero per channel.

    Attributes:
        sizes: outer, channels, inner.
        scale: (channels,).
        inverse: (channels,).
        zero: (channels,) to add to steps; None where bounds count from ``offset``.
        offset: the zero point that all channels share; 0 with ``zero``.
    """

    sizes: tuple[int, int, int]
    scale: Tensor
    inverse: Tensor
    zero: Tensor | None
    offset: int


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Return ``(clamp(round(x/s) + z, quant_min, quant_max) - z) * s``; a copy while the grid is switched off.

    Args:
        x: any shape and float dtype; the result has both.
        grid: of one scale s and zero point z, or one per index of axis ``grid.qtype.axis`` of ``x``.
    """
    channels = _channels_of(x, grid)
    if channels is None:
        return reference.fake_quantize(x, grid)
    y = torch.empty_like(x)
    _run(x, grid, channels, y, None)
    return y


def fake_quantize_with_mask(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return ``(clamp(round(x/s) + z, quant_min, quant_max) - z) * s``, and where its gradient passes.

    Args:
        x: any shape; float16, bfloat16, float32 or float64 (which computes in float64).
        grid: of one scale s and zero point z, or one per index of axis ``grid.qtype.axis`` of ``x``.

    Returns:
        ``(y, mask)``: ``x.dtype``, and bool: whether the rounded, unclipped code lies in the range; False at NaN. While
        the grid is switched off ``y`` is a copy of ``x`` and the mask True.
    """
    channels = _channels_of(x, grid, adds_zero=True)
    if channels is None:
        return reference.fake_quantize_with_mask(x, grid)
    y, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    _run(x, grid, channels, y, mask)
    return y, mask


def fake_quantize_backward(dy: Tensor, x: Tensor, grid: Grid, blocks_ends: bool = False) -> Tensor:
    """Return ``dy``, in ``x``'s dtype, where the rounded, unclipped code lies in the codes' range, else 0; 0 at NaN.

    While the grid is switched off, ``dy`` itself is returned.

    Args:
        dy: gradient of the result, shaped as ``x``.
        x: the input of :func:`fake_quantize`.
        grid: the grid that :func:`fake_quantize` rounded to, unchanged.
        blocks_ends: whether the first and the last code block the gradient, too.
    """
    channels = _channels_of(x, grid) if is_plain(dy) else None
    if channels is None:
        return reference.fake_quantize_backward(dy, x, grid, blocks_ends)
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    dx, (low, high) = torch.empty_like(x), _bounds(grid, channels)
    zero = None if channels.zero is None else channels.zero.data_ptr()
    of_grid = (channels.inverse.data_ptr(), zero, low + blocks_ends, high - blocks_ends)
    library().fake_quantize_backward(dy.data_ptr(), x.data_ptr(), *channels.sizes, *of_grid, dx.data_ptr())
    return dx


def _run(x: Tensor, grid: Grid, channels: _Channels, y: Tensor, mask: Tensor | None) -> None:
    """Write ``x``, rounded and clipped to the grid, to ``y``, and where gradients pass to ``mask`` (None: nowhere)."""
    zero = None if channels.zero is None else channels.zero.data_ptr()
    of_grid = (channels.scale.data_ptr(), channels.inverse.data_ptr(), zero, *_bounds(grid, channels))
    into = (y.data_ptr(), None if mask is None else mask.data_ptr())
    library().fake_quantize(x.data_ptr(), *channels.sizes, *of_grid, *into)


def _bounds(grid: Grid, channels: _Channels) -> tuple[int, int]:
    return grid.qtype.quant_min - channels.offset, grid.qtype.quant_max - channels.offset


def _channels_of(x: Tensor, grid: Grid, adds_zero: bool = False) -> _Channels | None:
    """Return how compiled code sees a tensor and its grid; None if it can't take them, or the grid is switched off.

    Args:
        x: the tensor.
        grid: the grid.
        adds_zero: whether the zero point is added to steps before they are compared with the ends; else the ends are
            counted from the zero point, if one holds for all channels.
    """
    qtype, axis = grid.qtype, grid.qtype.axis
    if not (is_plain(x) and x.numel() and is_dense(x) and rounds_to_even_integers(grid) and are_vectors(grid.scale)):
        return None
    if grid.enabled_flag() is not True or grid.granularity.group is not None:
        return None
    if qtype.quant_max - qtype.quant_min >= WIDE_CODES:
        return None
    count = grid.scale.numel()
    if count > 1 and (axis is None or count != x.shape[axis]):
        return None
    inner = 1 if count == 1 or axis is None else x.stride(axis)
    sizes = (1, 1, x.numel()) if count == 1 else (x.numel() // (count * inner), count, inner)
    given, zero, offset = grid.zero_point, None, 0
    if given is not None:
        if not given.is_cpu or given.numel() not in (1, count):
            return None
        if given.numel() == 1 and not adds_zero:
            offset = int(given)
        elif bool(given.any()):
            zero = given.reshape(-1).float().expand(count).contiguous()
    return _Channels(sizes, grid.scale, reciprocal(grid.scale), zero, offset)
