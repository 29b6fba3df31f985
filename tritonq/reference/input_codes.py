"""A tensor that lies on a grid as codes of one byte, and back: what a backward keeps of an operator's input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype
from tritonq.grid import Grid
from tritonq.reference.scratch import borrow


class InputCodes(NamedTuple):
    """A tensor as one-byte codes: it is ``(codes - shift) · scale``.

    Attributes:
        codes: int8, shaped as the tensor: each code of the grid less :func:`middle_of`.
        scale: one element, a copy of the grid's.
        shift: one element, what was added to ``round(x / scale)`` so that codes fit int8 (:func:`shift_of`); int32, or
            float32 if a kernel wrote it. None: nothing was added.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None


def encode(x: Tensor, grid: Grid, trusted: bool) -> InputCodes | None:
    """Return int8 codes ``round(x / scale) + shift`` with scale and shift, or None if ``x`` can't be rebuilt exactly.

    ``shift`` is the zero point minus :func:`middle_of` the grid's codes, so that they fit int8; None stands for 0.

    Args:
        x: float32, float16 or bfloat16, any shape.
        grid: per tensor, with at most 256 codes.
        trusted: whether ``x`` is known to lie on the grid: the result is then never None. If not, the rebuilt values
            are compared with ``x``, which waits for a GPU. NaN and infinities don't lie on a grid.
    """
    scale = grid.scale.clone()
    codes = torch.mul(x.float(), scale.reciprocal(), out=borrow("local", x, torch.float32)).round_()
    shift, middle = shift_of(grid), middle_of(grid)
    if shift is not None:
        codes.add_(shift)
    if x.dtype == torch.bfloat16:
        # Coarser than the grid at its far end, where the nearest step may lie beyond the last one.
        codes.clamp_(grid.qtype.quant_min - middle, grid.qtype.quant_max - middle)
    if not trusted and not _is_exact(x, codes, shift, scale):
        return None
    return InputCodes(codes.to(torch.int8), scale, shift)


def decode(codes: InputCodes, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return ``(codes - shift) · scale``, computed in float32, in ``dtype``: the tensor that :func:`encode` was given.

    Args:
        codes: that :func:`encode` returned.
        dtype: of that tensor.
        out: float32 memory for the computation, shaped as the codes; overwritten, and returned if ``dtype`` is float32.
            None: new memory.
    """
    steps = codes.codes.float() if out is None else out.copy_(codes.codes)
    if codes.shift is not None:
        steps.sub_(codes.shift)
    return as_dtype(steps.mul_(codes.scale), dtype)


def middle_of(grid: Grid) -> int:
    """Return the code that a byte holds as 0.

    It is the middle of the code range, ``(quant_min + quant_max + 1) // 2``: 128 for 0..255, 0 for -128..127. For a
    grid without zero point whose codes fit int8 as they are it is 0.
    """
    smallest, largest = grid.qtype.quant_min, grid.qtype.quant_max
    if grid.zero_point is None and smallest >= -128 and largest <= 127:
        return 0
    return (smallest + largest + 1) // 2


def shift_of(grid: Grid) -> Tensor | None:
    """Return what is added to ``round(x / scale)`` so that it fits int8: the zero point minus :func:`middle_of`.

    It is int32, one element, on the grid's device. None, for 0, if the grid has no zero point and needs no shift.
    """
    middle = middle_of(grid)
    if grid.zero_point is None:
        return torch.full_like(grid.scale, -middle, dtype=torch.int32) if middle else None
    return grid.zero_point - middle


def _is_exact(x: Tensor, codes: Tensor, shift: Tensor | None, scale: Tensor) -> bool:
    """Whether ``(codes - shift) · scale`` equals ``x`` everywhere; False if ``x`` has a NaN."""
    out = borrow("product", codes)
    values = torch.mul(codes, scale, out=out) if shift is None else torch.sub(codes, shift, out=out).mul_(scale)
    difference = values.to(x.dtype).sub_(x)
    return not x.numel() or float(difference.amax()) == 0 == float(difference.amin())
