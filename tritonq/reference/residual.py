"""Residual joins in PyTorch: the specification of `tritonq.kernels.residual` and the CPU path."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.grid import Grid, RangeStatistics
from tritonq.reference.activation import observe, quantize_, rectify_, straight_through_
from tritonq.reference.operator import Like, New, operator
from tritonq.reference.ranges import OBSERVED, settled
from tritonq.reference.scratch import borrow_or_new

_BITS = 8
# Planes start where a kernel can read 128 bits at a time.
_ALIGNMENT = 16


class RoundedResult(NamedTuple):
    """The result, and one bit per element: whether its gradient passes.

    Attributes:
        y: shaped as the inputs; dense.
        mask: uint8, ceil(n / 8) of them, rounded up to a multiple of 16. The elements of ``y`` in memory order are cut
            into eight planes of that length; plane i is bit i of every byte.
    """

    y: Tensor
    mask: Tensor


_RESULT: Any = Like("a")
_MASK: Any = New(lambda arguments: (mask_length(arguments["a"].numel()),), "a", torch.uint8)


@operator(returns=RoundedResult(_RESULT, _MASK), mutates=OBSERVED)
def forward(
    a: Tensor, b: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None
) -> RoundedResult:
    """Return ``FQ(relu?(a + b))``: observes the sum, which is float32, and rounds once to the dtype of the inputs.

    Args:
        a: any shape.
        b: of ``a``'s shape and dtype.
        grid: per tensor; None leaves the result in float.
        statistics: the range behind the grid, which the sum updates; None observes nothing.
        ceiling: of the ReLU before the quantizer; see :func:`tritonq.reference.activation.rectify`.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    y, mask = rounded(a.to(wide) + b.to(wide), grid, statistics, ceiling)
    return RoundedResult(y.to(a.dtype), mask)


def rounded(y: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None) -> RoundedResult:
    """Return ``FQ(relu?(y))`` and its mask, with ``y`` observed.

    ``y`` is dense, float32 or float64, and overwritten.
    """
    finite = False
    if grid is not None:
        statistics, finite = observe(y, grid, statistics, ceiling)
        grid = settled(grid, statistics)
    # Threshold and pack before the sum is overwritten, after the observer moved the thresholds.
    mask = pack(in_memory_order(_passes(y, grid, ceiling, finite)))
    y = rectify_(y, ceiling) if grid is None else quantize_(y, grid, ceiling)
    return RoundedResult(y, mask)


@operator(returns=Like("dy"))
def backward(dy: Tensor, mask: Tensor) -> Tensor:
    """Return ``dy`` where the mask's bit is set, else 0: the gradient of both inputs.

    Args:
        dy: in the memory order of the forward's result.
        mask: from the forward.
    """
    bits = borrow_or_new("local", dy)
    in_memory_order(bits).copy_(unpack(mask, dy.numel()))
    # Selects, so that an infinite gradient that is blocked becomes 0 and not NaN.
    return torch.ops.aten.threshold_backward(dy, bits, 0)  # type: ignore[no-any-return]


def _passes(y: Tensor, grid: Grid | None, ceiling: float | None, finite: bool) -> Tensor:
    """Return 1.0 where the gradient passes, else 0.0, strided as ``y``."""
    one, found = y.new_ones(()), borrow_or_new("local", y)
    passes = straight_through_(one, y if finite else found.copy_(y), grid, ceiling, finite, found)
    # Where nothing blocks, the gradient comes back as it is: a single one.
    return found.fill_(1) if passes is one else passes


def mask_length(count: int) -> int:
    """Return the number of bytes that hold one bit for each of ``count`` elements; see :class:`RoundedResult`."""
    return -(-count // (_BITS * _ALIGNMENT)) * _ALIGNMENT


def pack(passes: Tensor) -> Tensor:
    """Return one bit for each element of a vector of 0.0 and 1.0; see :class:`RoundedResult`."""
    length = mask_length(passes.numel())
    # By way of int8, which float converts to eight times as fast as to uint8.
    bits = passes.to(torch.int8).view(torch.uint8)
    planes = F.pad(bits, (0, length * _BITS - passes.numel())).view(_BITS, length)
    return torch.mul(planes, _powers(planes.device)).sum(0, dtype=torch.uint8)


def unpack(mask: Tensor, count: int) -> Tensor:
    """Return the first ``count`` bits, in the order of :func:`pack`: a uint8 vector, 0 or a power of two."""
    return torch.bitwise_and(mask, _powers(mask.device)).view(-1)[:count]


@cache
def _powers(device: torch.device) -> Tensor:
    """Return 1, 2, 4 and so on as a column: one call of PyTorch for eight planes, where small tensors cost calls."""
    with torch.inference_mode(False):
        return (2 ** torch.arange(_BITS, device=device)).to(torch.uint8).view(_BITS, 1)


def in_memory_order(x: Tensor) -> Tensor:
    """Return the elements of a dense tensor as a vector, as they lie in memory."""
    return x.as_strided((x.numel(),), (1,))
