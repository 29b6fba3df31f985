"""Results of any operation, observed and rounded, with one bit per element for the backward.

``relu?(y)`` is the ReLU with upper bound ``ceiling``, if any; FQ rounds to ``grid``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.grid import Grid, RangeStatistics
from tritonq.reference.activation import observe, passes, quantize_, rectify_
from tritonq.reference.operator import Like, New, operator
from tritonq.reference.ranges import OBSERVED, settled
from tritonq.reference.residual import RoundedResult, mask_length, rounded

_MASK: Any = New(lambda arguments: (mask_length(arguments["y"].numel()),), "y", torch.uint8)
_RESULT: Any = Like("y")


@operator(returns=RoundedResult(_RESULT, _MASK), mutates=OBSERVED, overwrites=("y",))
def forward(y: Tensor, grid: Grid, statistics: RangeStatistics | None, ceiling: float | None) -> RoundedResult:
    """Return ``FQ(relu?(y))`` and the mask of its gradient: uint8, one bit per element, set where ``dy`` passes.

    First ``relu?(y)`` updates ``statistics`` and the grid, in place; then it is rounded to the new grid. While that is
    switched off or without data, the result is ``relu?(y)``. :class:`~tritonq.reference.residual.RoundedResult` says
    where an element's bit is.

    Args:
        y: float32 or float64, dense; overwritten.
        grid: per tensor.
        statistics: the running range of the grid; None observes nothing.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.
    """
    return rounded(y, grid, statistics, ceiling)


@operator(returns=(_RESULT, Like("y", torch.bool)), mutates=OBSERVED, has_kernel=False, visible=True, made_again=True)
def forward_with_mask(
    y: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None
) -> tuple[Tensor, Tensor]:
    """Return ``FQ(relu?(y))`` and a mask of one bool per element, which compilers can fuse; for ``torch.compile``.

    First ``relu?(y)`` updates ``statistics`` and the grid, in place; then it is rounded to the new grid. While that is
    switched off or without data, the result is ``relu?(y)`` and only the ReLU blocks gradients.

    Args:
        y: float32 or float64; not changed.
        grid: per tensor; None: nothing is observed, and the result stays in float.
        statistics: the running range of the grid; None observes nothing.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one; None: no ReLU.

    Returns:
        The result, and bool of its shape: whether the gradient passes.
    """
    if grid is None:
        return rectify_(y.clone(), ceiling), passes(y, None, ceiling)
    grid = settled(grid, observe(y, grid, statistics, ceiling).statistics)
    return quantize_(y.clone(), grid, ceiling), passes(y, grid, ceiling, grid.enabled_on_device())
