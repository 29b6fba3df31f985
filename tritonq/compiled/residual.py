"""Residual joins ``FQ(relu?(a + b))`` in C++, with one bit per element for the backward, set if the gradient passes.

The bits are a uint8 tensor, the *mask*: the n elements in memory order are cut into eight planes of ``n / 8`` elements,
rounded up to a multiple of 16; plane i is bit i of every byte. What the compiled code does not take
`tritonq.reference.residual` computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.compiled.arguments import grid_arguments, is_plain, note_observed, takes_grid
from tritonq.compiled.build import library
from tritonq.grid import Grid, RangeStatistics
from tritonq.reference import residual as reference
from tritonq.reference.residual import RoundedResult, mask_length
from tritonq.reference.scratch import is_dense


def forward(
    a: Tensor, b: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None
) -> RoundedResult:
    """Return ``FQ(relu?(a + b))``, in ``a``'s dtype, and its mask: a bit is 1 where the result's gradient passes.

    With ``statistics``, ``relu?(a + b)`` first updates range and grid. With a grid, it is then rounded to that, unless
    the grid is switched off or its range has no data.

    Args:
        a: any shape and float dtype.
        b: of the same shape and dtype.
        grid: of the quantizer, per tensor, updated in place; None: nothing is observed, the result stays in float.
        statistics: the running range of the grid, updated in place; None observes nothing.
        ceiling: upper bound of the ReLU, infinity for a plain one; None without one.
    """
    fits = is_plain(a, b) and a.stride() == b.stride() and is_dense(a) and a.numel() > 0
    if not fits or not takes_grid(grid, statistics):
        return reference.forward(a, b, grid, statistics, ceiling)
    joined = rounded(a, b, torch.empty_like(a), grid, statistics, ceiling)
    return reference.forward(a, b, grid, statistics, ceiling) if joined is None else joined


def rounded(
    a: Tensor, b: Tensor | None, y: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None
) -> RoundedResult | None:
    """Write ``FQ(relu?(a + b))`` to ``y``; return it with its mask, or None if a value of ``a + b`` is not finite.

    If it returns None nothing was observed, and ``y`` holds ``a + b``. The caller makes sure that
    :func:`~tritonq.compiled.arguments.takes_grid` accepts grid and statistics.

    Args:
        a: dense, float32, on the CPU, not empty.
        b: laid out as ``a``; None: ``y`` must be ``a`` itself, and the result is ``FQ(relu?(y))``.
        y: memory for the result, laid out as ``a``; may be ``a``.
        grid: per tensor, updated in place; None, switched off, or without data: the result is ``relu?(a + b)``.
        statistics: the running range of the grid, updated in place; None observes nothing.
        ceiling: upper bound of the ReLU, infinity for a plain one; None without one.
    """
    count, length = y.numel(), mask_length(y.numel())
    mask, given = torch.empty(length, dtype=torch.uint8), grid_arguments(grid, statistics, ceiling)
    other = None if b is None else b.data_ptr()
    if not library().join_forward(a.data_ptr(), other, count, length, *given, y.data_ptr(), mask.data_ptr()):
        return None
    if given.observes:
        note_observed(grid, statistics)
    return RoundedResult(y, mask)


def backward(dy: Tensor, mask: Tensor) -> Tensor:
    """Return the gradient of both summands: ``dy`` where the bit of the mask of :func:`forward` is set, else 0.

    ``dy``, the gradient of the forward's result, must lie in the memory order of that result; it is not changed.
    """
    if not is_plain(dy) or not is_dense(dy):
        return reference.backward(dy, mask)
    result = torch.empty_like(dy)
    library().join_backward(dy.data_ptr(), mask.data_ptr(), dy.numel(), mask.numel(), result.data_ptr())
    return result
