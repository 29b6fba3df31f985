"""Residual joins ``FQ(relu?(a + b))`` in C++: the functions of `tritonq.reference.residual`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tritonq.compiled.arguments import is_plain, observe, tail_of, takes_grid
from tritonq.compiled.build import library
from tritonq.grid import Grid, RangeStatistics
from tritonq.reference import residual as reference
from tritonq.reference.ranges import settled
from tritonq.reference.residual import RoundedResult, mask_length
from tritonq.reference.scratch import is_dense


def forward(
    a: Tensor, b: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None
) -> RoundedResult:
    """Return ``FQ(relu?(a + b))`` and the mask of its gradient: uint8, one bit per element, 1 where ``dy`` passes.

    Args:
        a: float tensor.
        b: of the same shape.
        grid: of the quantizer, per tensor, updated in place; None leaves the result in float.
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
    """Write ``FQ(relu?(a + b))`` to ``y``; return it with its mask, or None if a value is not finite.

    Args:
        a: dense, float32.
        b: laid out as ``a``; None: the result is ``FQ(relu?(a))``.
        y: memory for the result, laid out as ``a``; may be ``a``.
        grid: per tensor, or None.
        statistics: the running range of the grid, or None.
        ceiling: of the ReLU, or None.
    """
    functions, count, ends = library(), y.numel(), (ctypes.c_float * 2)()
    other = None if b is None else b.data_ptr()
    if not functions.join_sum(a.data_ptr(), other, count, y.data_ptr(), ctypes.addressof(ends)):
        return None
    if grid is not None:
        grid = settled(grid, observe(ends[0], ends[1], grid, statistics, ceiling))
    length = mask_length(count)
    mask, tail = torch.empty(length, dtype=torch.uint8), tail_of(grid, ceiling)
    functions.join_apply(y.data_ptr(), count, length, ctypes.addressof(tail), mask.data_ptr())
    return RoundedResult(y, mask)


def backward(dy: Tensor, mask: Tensor) -> Tensor:
    """Return the gradient of both summands: ``dy`` where the bit of the mask of :func:`forward` is set, else 0."""
    if not is_plain(dy) or not is_dense(dy):
        return reference.backward(dy, mask)
    result = torch.empty_like(dy)
    library().join_backward(dy.data_ptr(), mask.data_ptr(), dy.numel(), mask.numel(), result.data_ptr())
    return result
