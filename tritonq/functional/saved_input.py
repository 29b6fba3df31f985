"""Keeping an operator's input for its backward: as 8-bit codes where it lies on a known grid."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from tritonq.functional.marks import codes_of, is_rounded, mark_codes, mark_rounded
from tritonq.grid import Grid, RangeStatistics
from tritonq.qparams import is_readable
from tritonq.reference.ranges import settled
from tritonq.reference.scratch import borrow

_MAX_BITS = 8


class SavedInput(NamedTuple):
    """A tensor, or its codes as int8.

    Attributes:
        values: the tensor, or ``code - zero_point + shift``.
        scale: of the codes; None where ``values`` is the tensor.
        shift: what takes codes around the middle of their range; None for zero.
        dtype: of the tensor.
    """

    values: Tensor
    scale: Tensor | None
    shift: Tensor | None
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What to save for the backward; :func:`restore` takes them back."""
        return self.values, self.scale, self.shift


def keep(x: Tensor, grid: Grid | None) -> SavedInput:
    """``x`` as codes of ``grid`` if it can be rebuilt from them exactly, else ``x`` itself.

    A tensor that a quantizer has just rounded is known to lie on its grid (:func:`mark`). Any other tensor, such as one
    that a hook changed, is compared with its codes on a CPU, and kept itself elsewhere, where the comparison would wait
    for the device. Operators that take the same tensor share its codes.
    """
    if grid is None or not _is_compact(grid) or x.dtype == torch.float64:
        return SavedInput(x, None, None, x.dtype)
    shared = codes_of(x, grid.scale)
    if shared is not None:
        return cast(SavedInput, shared)
    marked = is_rounded(x, grid.scale)
    if not marked and not is_readable(x):
        return SavedInput(x, None, None, x.dtype)
    saved = _encode(x, grid, marked)
    if saved.scale is not None:
        mark_codes(x, grid.scale, saved)
    return saved


def _is_compact(grid: Grid) -> bool:
    """Whether a code takes one byte, and one scale serves all."""
    return grid.qtype.bits <= _MAX_BITS and grid.qtype.axis is None


def mark(y: Tensor, scale: Tensor, grid: Grid, statistics: RangeStatistics | None = None) -> None:
    """Note on ``y`` that its values were rounded to the grid of ``scale``, a quantizer's buffer, if it was active.

    Where the switch can't be read without waiting for a device, the note is made all the same: :func:`keep` is given a
    grid only while its quantizer is active.

    Args:
        y: the operator's result.
        scale: the buffer.
        grid: of the quantizer now, or the snapshot that rounded ``y``.
        statistics: the range behind it; None for a snapshot.
    """
    if torch.compiler.is_compiling() or y.is_inference():
        return
    if not is_readable(y) or settled(grid, statistics).enabled_flag() is True:
        mark_rounded(y, scale)


def restore(saved: SavedInput, out: Tensor | None = None) -> Tensor:
    """The tensor that was given to :func:`keep`, written to ``out`` (float32) where that is of use."""
    if saved.scale is None:
        return saved.values
    steps = saved.values.float() if out is None else out.copy_(saved.values)
    if saved.shift is not None:
        steps.sub_(saved.shift)
    return steps.mul_(saved.scale).to(saved.dtype)


def _encode(x: Tensor, grid: Grid, trusted: bool) -> SavedInput:
    scale = grid.scale.clone()
    codes = torch.mul(x.float(), scale.reciprocal(), out=borrow("local", x, torch.float32)).round_()
    shift, middle = None, 0
    if grid.zero_point is not None:
        middle = (grid.qtype.quant_min + grid.qtype.quant_max + 1) // 2
        shift = grid.zero_point - middle
        codes.add_(shift)
    if x.dtype == torch.bfloat16:
        # Coarser than the grid at its far end, where the nearest step may lie beyond the last one.
        codes.clamp_(grid.qtype.quant_min - middle, grid.qtype.quant_max - middle)
    if not trusted and not _is_exact(x, codes, shift, scale):
        return SavedInput(x, None, None, x.dtype)
    return SavedInput(codes.to(torch.int8), scale, shift, x.dtype)


def _is_exact(x: Tensor, codes: Tensor, shift: Tensor | None, scale: Tensor) -> bool:
    """Whether ``(codes - shift) * scale`` is ``x``; not where ``x`` holds NaN."""
    out = borrow("product", codes)
    values = torch.mul(codes, scale, out=out) if shift is None else torch.sub(codes, shift, out=out).mul_(scale)
    difference = values.to(x.dtype).sub_(x)
    return not x.numel() or float(difference.amax()) == 0 == float(difference.amin())
