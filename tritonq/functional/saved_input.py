"""Keeping an operator's input for its backward: as 8-bit codes where it lies on a known grid."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tritonq.qparams import QuantizedType
from tritonq.reference.quantizer_state import is_readable

_MAX_BITS = 8


class InputGrid(NamedTuple):
    """The grid that a tensor lies on: its values are ``(code - zero_point) * scale``.

    Attributes:
        scale: float32, one element.
        zero_point: int32, one element.
        qtype: the codes.
    """

    scale: Tensor
    zero_point: Tensor
    qtype: QuantizedType

    @property
    def is_compact(self) -> bool:
        """Whether a code takes one byte."""
        return self.qtype.bits <= _MAX_BITS and self.qtype.axis is None


class SavedInput(NamedTuple):
    """A tensor, or its codes and their grid."""

    values: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What to save for the backward; :func:`restore` takes them back."""
        return self.values, self.scale, self.zero_point


def keep(x: Tensor, grid: InputGrid | None) -> SavedInput:
    """``x`` as codes of ``grid`` if it can be rebuilt from them exactly, else ``x`` itself.

    On a CPU that is verified; elsewhere the grid is trusted.
    """
    if grid is None or not grid.is_compact or x.dtype == torch.float64:
        return SavedInput(x, None, None, x.dtype)
    scale, zero_point = grid.scale.clone(), grid.zero_point.clone()
    steps = (x.float() * scale.reciprocal()).round_()
    if is_readable(x) and not _is_exact(x, steps, scale):
        return SavedInput(x, None, None, x.dtype)
    codes = steps.add_(zero_point).to(grid.qtype.storage_dtype)
    return SavedInput(codes, scale, zero_point, x.dtype)


def restore(saved: SavedInput) -> Tensor:
    """The tensor that was given to :func:`keep`."""
    if saved.scale is None or saved.zero_point is None:
        return saved.values
    return saved.values.float().sub_(saved.zero_point).mul_(saved.scale).to(saved.dtype)


def _is_exact(x: Tensor, steps: Tensor, scale: Tensor) -> bool:
    """Whether ``steps * scale`` is ``x``; not where ``x`` holds NaN."""
    difference = (steps * scale).to(x.dtype).sub_(x)
    return bool((difference.amax() == 0) & (difference.amin() == 0)) if x.numel() else True
