"""Arguments of compiled functions: which tensors and grids they can take, and these as addresses and numbers."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor, nn

from tritonq.grid import Grid, RangeStatistics
from tritonq.reference.min_max import merge_numbers_

_PLAIN = (Tensor, nn.Parameter)


class Tail(ctypes.Structure):
    """The ReLU and the grid of a result, as ``common.h`` declares them in C++."""

    _fields_ = (
        ("rounds", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("inverse", "scale", "lowest", "highest", "floor", "ceiling")),
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether compiled code can access the memory of each tensor: float32, on the CPU, no subclass.

    None counts as one.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
    return _is_memory_read()


def are_vectors(*tensors: Tensor | None) -> bool:
    """Whether each is None, or contiguous and such that :func:`is_plain` is True."""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
        if not tensor.is_contiguous():
            return False
    return _is_memory_read()


def _is_memory_read() -> bool:
    """Whether a tensor's own memory is what operators read: no dispatch mode, and no transform such as ``vmap``."""
    return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.maybe_current_level() is None


def takes_grid(grid: Grid | None, statistics: RangeStatistics | None) -> bool:
    """Whether compiled code can round to a grid and update its statistics; True if both are None.

    The grid has one scale, integer codes, and ties to even.
    """
    if grid is None:
        return statistics is None
    if grid.qtype.axis is not None or not rounds_to_even_integers(grid) or not are_vectors(grid.scale):
        return False
    return statistics is None or (statistics.rule != "torch_v1" and are_vectors(statistics.min_val, statistics.max_val))


def rounds_to_even_integers(grid: Grid) -> bool:
    """Whether a grid has integer codes and rounds ties to the even one."""
    return grid.qtype.rounding == "half_even" and grid.qtype.float_format is None


def observes(statistics: RangeStatistics | None) -> bool:
    """Whether a batch changes the running range: it is not None, not frozen, and switched on."""
    if statistics is None or statistics.frozen:
        return False
    return statistics.enabled is None or bool(statistics.enabled)


def observe(
    low: float, high: float, grid: Grid, statistics: RangeStatistics | None, ceiling: float | None
) -> RangeStatistics | None:
    """Update range and grid as `tritonq.reference.activation.observe`, from the ends of a batch without ReLU.

    Args:
        low: smallest value before the ReLU, finite.
        high: largest value.
        grid: per tensor; updated.
        statistics: the running range; None observes nothing.
        ceiling: of the ReLU; None without one.
    """
    if statistics is None or not observes(statistics):
        return statistics
    if ceiling is not None:
        low, high = (min(max(end, 0.0), ceiling) for end in (low, high))
    merge_numbers_(low, high, statistics, grid)
    return statistics.with_data()


def reciprocal(scale: float) -> float:
    """Return ``1 / scale`` in float32, for a float32 number; infinity for 0."""
    # A quotient of float32 numbers that is rounded to float64 and then to float32 is as if rounded once.
    return _float32(1.0 / scale) if scale else math.inf


def _float32(number: float) -> float:
    return float(ctypes.c_float(number).value)


def tail_of(grid: Grid | None, ceiling: float | None) -> Tail:
    """Return the constants by which compiled code applies a ReLU up to ``ceiling``, if any, and rounds to ``grid``.

    It does not round if ``grid`` is None or switched off.
    """
    floor, top = (-math.inf, math.inf) if ceiling is None else (0.0, ceiling)
    if grid is None or not grid.is_enabled_on_host():
        return Tail(0, 0.0, 0.0, -math.inf, math.inf, floor, top)
    scale = float(grid.scale)
    inverse = reciprocal(scale)
    of_ceiling = _float32(top * inverse)  # float64 holds the product of two float32 numbers
    if math.isfinite(of_ceiling):
        of_ceiling = float(round(of_ceiling))
    zero = 0 if grid.zero_point is None else int(grid.zero_point)
    lowest, highest = grid.qtype.quant_min - zero, grid.qtype.quant_max - zero
    if ceiling is not None:
        lowest = max(lowest, 0)
    return Tail(1, inverse, scale, lowest, min(highest, of_ceiling), floor, top)
