"""Residual joins ``FQ(relu?(a + b))`` in PyTorch: the specification of `tritonq.kernels.residual` and the CPU path.

For the backward they keep a *mask*: one bit per element, set if the gradient passes.
"""

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
from tritonq.reference.scratch import borrow_or_new, in_memory_order

_BITS = 8
# Planes start where a kernel can read 128 bits at a time.
_ALIGNMENT = 16


class RoundedResult(NamedTuple):
    """A rounded result, and the mask of its gradient.

    Attributes:
        y: shaped as the inputs; dense.
        mask: uint8, one bit per element of ``y``: set if neither ReLU nor the clip blocks the gradient. The elements in
            memory order are cut into eight planes of one length; plane i is bit i of every byte. That length is
            ``y.numel() / 8``, rounded up to a multiple of 16; zeros fill up the planes.
    """

    y: Tensor
    mask: Tensor


_RESULT: Any = Like("a")
_MASK: Any = New(lambda arguments: (mask_length(arguments["a"].numel()),), "a", torch.uint8)


@operator(returns=RoundedResult(_RESULT, _MASK), mutates=OBSERVED)
def forward(
    a: Tensor, b: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None
) -> RoundedResult:
    """Return ``FQ(relu?(a + b))``, computed in float32 and rounded once to ``a``'s dtype, and its mask.

    The mask is packed as :class:`RoundedResult` says. There is always one: without ReLU and grid the bits of all
    elements are set.

    With ``statistics``, ``relu?(a + b)`` first updates range and grid, in place. With a grid, it is then rounded to
    that, unless the grid is switched off or its range has no data.

    Args:
        a: any shape and float dtype (float64 computes in float64).
        b: of ``a``'s shape and dtype.
        grid: per tensor; None: nothing is observed, and the result stays in float.
        statistics: the running range of the grid; None observes nothing.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    y, mask = rounded(a.to(wide) + b.to(wide), grid, statistics, ceiling)
    return RoundedResult(y.to(a.dtype), mask)


def rounded(y: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None) -> RoundedResult:
    """Return ``FQ(relu?(y))``, in ``y``'s dtype, and its mask (:class:`RoundedResult`).

    With a grid and ``statistics``, ``relu?(y)`` is observed first: it updates the range in ``statistics``, and the
    grid's scale and zero point follow, in place. With a grid, values are then rounded to it. While the grid is switched
    off, or its range has no data, the result is ``relu?(y)``.

    Args:
        y: any shape, dense, float32 or float64; overwritten.
        grid: per tensor; None: nothing is observed, and the result stays in float.
        statistics: the running range of the grid; None observes nothing.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.
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
        mask: the one that the forward returned.
    """
    bits = borrow_or_new("local", dy)
    in_memory_order(bits).copy_(unpack(mask, dy.numel()))
    # Selects, so that an infinite gradient that is blocked becomes 0 and not NaN.
    return torch.ops.aten.threshold_backward(dy, bits, 0)  # type: ignore[no-any-return]


def _passes(y: Tensor, grid: Grid | None, ceiling: float | None, finite: bool) -> Tensor:
    """Return 1.0 where the gradient passes, else 0.0, with the strides of ``y``.

    ``finite`` says that ``y`` is known to hold no infinity and no NaN.
    """
    one, found = y.new_ones(()), borrow_or_new("local", y)
    passes = straight_through_(one, y if finite else found.copy_(y), grid, ceiling, finite, found)
    # Where nothing blocks, the gradient comes back as it is: a single one.
    return found.fill_(1) if passes is one else passes


def mask_length(count: int) -> int:
    """Return the bytes of a mask for ``count`` elements: ``count / 8``, rounded up to a multiple of 16."""
    return -(-count // (_BITS * _ALIGNMENT)) * _ALIGNMENT


def pack(passes: Tensor) -> Tensor:
    """Return a vector of 0.0 and 1.0 as a mask: uint8 (length,), element ``p · length + i`` is bit p of byte i.

    The length is that of :func:`mask_length`: an eighth of the vector's, rounded up to a multiple of 16.
    """
    length = mask_length(passes.numel())
    # By way of int8, which float converts to eight times as fast as to uint8.
    bits = passes.to(torch.int8).view(torch.uint8)
    planes = F.pad(bits, (0, length * _BITS - passes.numel())).view(_BITS, length)
    return torch.mul(planes, _powers(planes.device)).sum(0, dtype=torch.uint8)


def unpack(mask: Tensor, count: int) -> Tensor:
    """Return the first ``count`` bits of a mask, in the order of :func:`pack`: uint8 (count,), not 0 for a set bit."""
    return torch.bitwise_and(mask, _powers(mask.device)).view(-1)[:count]


@cache
def _powers(device: torch.device) -> Tensor:
    """Return 1, 2, 4, ... 128 as a (8, 1) tensor: one product with it packs or unpacks eight planes."""
    with torch.inference_mode(False):
        return (2 ** torch.arange(_BITS, device=device)).to(torch.uint8).view(_BITS, 1)
