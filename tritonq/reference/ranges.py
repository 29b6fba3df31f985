"""Running ranges and grids in operators that observe and quantize: update the range, then copy the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype
from tritonq.grid import SWITCH, Grid, RangeStatistics
from tritonq.qparams import is_readable
from tritonq.reference.min_max import merge_range_, merge_where_

# Tensors that such an operator updates in place.
OBSERVED = (
    *("statistics.min_val", "statistics.max_val", "statistics.nonfinite_count"),
    *("grid.scale", "grid.zero_point"),
)


def observe_range(
    grid: Grid,
    statistics: RangeStatistics | None,
    low: Tensor,
    high: Tensor,
    nonfinite: Tensor | None = None,
    ordered: bool = False,
) -> RangeStatistics | None:
    """Merge a batch's range into the running one, and write the scale and zero point that follow, in place.

    How it is merged (extremes of all batches, or a moving average) and how a range becomes scale and zero point is said
    by ``statistics``.

    Args:
        grid: its scale and zero point are updated.
        statistics: the running range; nothing happens while it is frozen, switched off or None.
        low: smallest finite value of the batch, shaped as ``statistics.min_val``; +inf where there is none.
        high: largest finite value, or -inf.
        nonfinite: number of values that are not finite, added to ``statistics.nonfinite_count``; None for zero.
        ordered: whether the host knows that ``low <= high``, both finite, and that all values are finite.

    Returns:
        The given statistics. If an ``ordered`` batch was merged, and ``statistics.enabled`` is None or the host can
        read it without waiting, the result has ``has_data=True``: a copy with the same tensors if that was False.
    """
    if statistics is None or statistics.frozen:
        return statistics
    enabled = None
    if statistics.enabled is None or is_readable(statistics.enabled):
        if statistics.enabled is not None and not bool(statistics.enabled):
            return statistics
        if ordered:
            merge_range_(as_dtype(low, torch.float32), as_dtype(high, torch.float32), statistics, grid)
            return statistics.with_data()
    else:
        enabled = statistics.enabled.view(()) != 0
    merge_where_(low.float(), high.float(), nonfinite, statistics, grid, enabled)
    return statistics


def settled(grid: Grid, statistics: RangeStatistics | None) -> Grid:
    """Return the grid with a switch that is on only if the grid's own is on and something was observed.

    Scale and zero point are the given tensors; copies while a graph is traced. The switch is a CPU tensor if its value
    can be known without waiting for a device.

    Args:
        grid: the grid; not changed.
        statistics: its running range, which holds data if ``has_data`` says so, or ``min_val <= max_val`` in any
            channel; None: the grid counts as observed.
    """
    if torch.compiler.is_compiling():
        on = grid.enabled_on_device()
        if statistics is not None and not statistics.has_data:
            on = on & (statistics.min_val <= statistics.max_val).any()
        return grid.with_buffers(grid.scale, grid.zero_point, on.view(1)).copy()
    flag = grid.enabled_flag()
    if statistics is not None and not statistics.has_data:
        seen = (statistics.min_val <= statistics.max_val).any()
        flag = (flag and bool(seen)) if isinstance(flag, bool) and is_readable(seen) else seen & flag
    return grid.with_buffers(grid.scale, grid.zero_point, SWITCH[flag] if isinstance(flag, bool) else flag.view(1))


def snapshot(grid: Grid, statistics: RangeStatistics | None) -> Grid:
    """Return a copy of the grid, whose switch is on only if the grid's own is on and something was observed.

    A backward reads it, because later steps change the grid. ``statistics`` is its running range; None: the grid counts
    as observed.
    """
    grid = settled(grid, statistics)
    if torch.compiler.is_compiling():
        return grid
    return _with_copies(grid, grid.enabled)


def snapshot_of(grid: Grid, rounds: bool) -> Grid:
    """Return a copy of the grid for a backward, whose switch is ``rounds``: whether values were rounded to the grid."""
    return _with_copies(grid, SWITCH[rounds])


def _with_copies(grid: Grid, enabled: Tensor | None) -> Grid:
    zero_point = None if grid.zero_point is None else grid.zero_point.clone()
    return grid.with_buffers(grid.scale.clone(), zero_point, enabled)
