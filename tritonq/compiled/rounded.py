"""Results of any operation, observed and rounded, in C++, with one bit per element for the backward.

``relu?(y)`` is the ReLU with upper bound ``ceiling``, if any; FQ rounds to ``grid``. What the compiled code does not
take `tritonq.reference.rounded` computes.
"""

from __future__ import annotations

from torch import Tensor

from tritonq.compiled import residual
from tritonq.compiled.arguments import is_plain, takes_grid
from tritonq.grid import Grid, RangeStatistics
from tritonq.reference import rounded as reference
from tritonq.reference.residual import RoundedResult
from tritonq.reference.scratch import is_dense


def forward(y: Tensor, grid: Grid, statistics: RangeStatistics | None, ceiling: float | None) -> RoundedResult:
    """Return ``FQ(relu?(y))`` and its mask: uint8, one bit per element, 1 where the result's gradient passes.

    First ``relu?(y)`` updates range and grid; then it is rounded to the new grid. While that is switched off or without
    data, the result is ``relu?(y)``. The elements in memory order are cut into eight planes of ``n / 8``, rounded up to
    a multiple of 16; plane i is bit i of every byte of the mask.

    Args:
        y: float32 or float64, dense; overwritten, and the result's memory.
        grid: of the quantizer, per tensor, updated in place.
        statistics: the running range of the grid, updated in place; None observes nothing.
        ceiling: upper bound of the ReLU, infinity for a plain one; None without one.
    """
    if is_plain(y) and is_dense(y) and y.numel() and takes_grid(grid, statistics):
        joined = residual.rounded(y, None, y, grid, statistics, ceiling)
        if joined is not None:
            return joined
    return reference.forward(y, grid, statistics, ceiling)
