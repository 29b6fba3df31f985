"""Arguments of compiled functions: which tensors and grids they can take, and these as addresses and numbers."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from tritonq.compiled.build import library
from tritonq.grid import Grid, RangeStatistics
from tritonq.qparams import RangeRule, fixed_zero_point
from tritonq.quantized_type import QuantizedType
from tritonq.reference.min_max import FALL

_PLAIN = (Tensor, nn.Parameter)


class Tail(ctypes.Structure):
    """The ReLU and the grid of a result, as ``common.h`` declares them in C++.

    With y a value before the ReLU: if ``rounds``, the result is ``clamp(round(y · inverse), lowest, highest) · scale``,
    with ``inverse`` 1 / scale, and as ends the smallest and largest code that the ReLU leaves, minus the zero point;
    else it is y, clipped to ``floor .. ceiling``, the ends of the ReLU (infinite without one).
    """

    _fields_ = (
        ("rounds", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("inverse", "scale", "lowest", "highest", "floor", "ceiling")),
    )


class Rule(ctypes.Structure):
    """How a batch changes a running range, and how the grid follows, as ``common.h`` declares it in C++.

    Fields:

    - ``constant``: weight of a batch in the average, -1: no average, but the extremes of all batches.
    - ``copy_above``: with an average, a batch whose largest magnitude is more than this times the range's replaces the
      range; -1: only the first batch does, and ``fall`` does not count. ``fall``: so does a batch whose largest
      magnitude is smaller by more than this factor and not 0.
    - ``reach``: if ``fixed``, the scale is the range's largest magnitude divided by this number; else the range is
      widened to hold 0, and the scale is ``(max - min) / (quant_max - quant_min)``. ``eps``: smallest scale.
    - ``fixed``: whether the range is symmetric, so that every zero point is ``zero_point``; else it is
      ``quant_min - round(min / scale)``, with ties away from zero and unclipped if ``megengine``, else to even and
      clipped to the codes.
    - ``quant_min``, ``quant_max``: smallest and largest code.
    """

    _fields_ = (
        *((name, ctypes.c_double) for name in ("constant", "copy_above", "fall")),
        *((name, ctypes.c_float) for name in ("reach", "eps")),
        *((name, ctypes.c_int32) for name in ("fixed", "zero_point", "megengine", "quant_min", "quant_max")),
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether compiled code can access the memory of each tensor: float32, on the CPU, no subclass but nn.Parameter.

    None counts as such a tensor. False while a dispatch mode or a transform such as ``vmap`` is active.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
    return _is_memory_read()


def are_vectors(*tensors: Tensor | None) -> bool:
    """Whether each is None or a contiguous tensor of any shape, float32, on the CPU, of no subclass but nn.Parameter.

    False while a dispatch mode or a transform such as ``vmap`` is active.
    """
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
    """Whether compiled code can round to a grid and update its statistics (None: there are none to update).

    Without a grid: whether there are no statistics either.

    The grid must have one scale, integer codes, ties to even and, if any, an int32 zero point; the statistics another
    rule than "torch_v1" and a smallest scale above 0. The scale and the ends of the range must be tensors of
    :func:`are_vectors`: contiguous float32 on the CPU, and no dispatch mode or transform may be active.
    """
    if grid is None:
        return statistics is None
    if grid.qtype.axis is not None or not rounds_to_even_integers(grid) or not are_vectors(grid.scale):
        return False
    if grid.zero_point is not None and grid.zero_point.dtype is not torch.int32:
        return False
    return statistics is None or (follows_a_rule(statistics) and are_vectors(statistics.min_val, statistics.max_val))


def follows_a_rule(statistics: RangeStatistics) -> bool:
    """Whether compiled code knows how the grid follows from a running range.

    It does if ``statistics.rule`` is not "torch_v1", the formula of torch's fused operator, and ``statistics.eps``, the
    smallest scale, is above 0.
    """
    return statistics.rule != "torch_v1" and statistics.eps > 0


def rounds_to_even_integers(grid: Grid) -> bool:
    """Whether a grid has integer codes and rounds ties to the even one."""
    return grid.qtype.rounding == "half_even" and grid.qtype.float_format is None


def observes(statistics: RangeStatistics | None) -> bool:
    """Whether a batch changes the running range: ``statistics`` is not None, not frozen, and switched on."""
    if statistics is None or statistics.frozen:
        return False
    return statistics.enabled is None or bool(statistics.enabled)


def rests_on_data(statistics: RangeStatistics | None, changes: bool) -> bool:
    """Whether a running range holds data in at least one channel once this batch is observed; True for None, no range.

    A grid is rounded to only if this is True. ``changes``: whether the batch changes the range (:func:`observes`).
    """
    if statistics is None or changes or statistics.has_data:
        return True
    return bool((statistics.min_val <= statistics.max_val).any())


class GridArguments(NamedTuple):
    """A grid, its running range and the ReLU before it, as C++ functions take them, in this order.

    Attributes:
        rule: address of the :class:`Rule`, which has the codes and says how a range becomes scale and zero point;
            :func:`rule_of` keeps it alive. None without a grid.
        observes: whether the batch changes the running range.
        rounds: whether the result is rounded: the grid is switched on, and its range has data (with this batch), or
            there is no range. False without a grid.
        ceiling: upper bound of the ReLU, infinity for a plain one; NaN without one.
        min_val: address of the running minimum; None without a range. The caller keeps alive the tensors to which this
            and the other addresses point.
        max_val: address of the running maximum; None without a range.
        scale: address of the grid's scale; None without a grid.
        zero_point: address of the grid's zero point; None for zero, or without a grid.
    """

    rule: int | None
    observes: bool
    rounds: bool
    ceiling: float
    min_val: int | None
    max_val: int | None
    scale: int | None
    zero_point: int | None


def grid_arguments(grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None) -> GridArguments:
    """Return the arguments of a C++ function that observes a result and rounds it; :func:`takes_grid` must be True.

    Args:
        grid: per tensor; None leaves the result in float.
        statistics: the running range of the grid; None observes nothing.
        ceiling: upper bound of the ReLU, infinity for a plain one; None without one.
    """
    top = math.nan if ceiling is None else ceiling
    if grid is None:
        return GridArguments(None, False, False, top, None, None, None, None)
    zero_point = None if grid.zero_point is None else grid.zero_point.data_ptr()
    changes = observes(statistics)
    rounds = grid.is_enabled_on_host() and rests_on_data(statistics, changes)
    rule, min_val, max_val, scale = range_arguments(grid, statistics)
    return GridArguments(rule, changes, rounds, top, min_val, max_val, scale, zero_point)


def range_arguments(grid: Grid, statistics: RangeStatistics | None) -> tuple[int, int | None, int | None, int]:
    """Return four addresses: of a :class:`Rule`, running minimum, running maximum, and the grid's scale.

    The rule is made of the grid's type and of ``statistics``. Without ``statistics`` minimum and maximum are None.
    """
    qtype, scale = grid.qtype, grid.scale.data_ptr()
    if statistics is None:
        return ctypes.addressof(rule_of(qtype)), None, None, scale
    moves = (statistics.averaging_constant, statistics.copy_above)
    ends = (statistics.min_val.data_ptr(), statistics.max_val.data_ptr())
    return ctypes.addressof(rule_of(qtype, statistics.rule, statistics.eps, *moves)), *ends, scale


def note_observed(grid: Grid | None, statistics: RangeStatistics | None) -> None:
    """Count up the versions, torch's counters of in-place changes, of running range, scale and zero point.

    Call it after C++ has changed these. Nothing is done if ``grid`` or ``statistics`` is None.
    """
    if grid is not None and statistics is not None:
        changed = (statistics.min_val, statistics.max_val, grid.scale)
        increment_version(changed if grid.zero_point is None else (*changed, grid.zero_point))


@cache
def rule_of(
    qtype: QuantizedType,
    rule: RangeRule = "torch",
    eps: float = 0.0,
    averaging_constant: float | None = None,
    copy_above: float | None = None,
) -> Rule:
    """Return the :class:`Rule` with these values, the same object for equal ones, whose address stays valid.

    Args:
        qtype: the codes; integers.
        rule: how a range becomes scale and zero point: "torch" or "megengine".
        eps: smallest scale.
        averaging_constant: weight of a batch in a moving average; None: the extremes of all batches.
        copy_above: a batch whose largest magnitude is more than this times that of the range of a moving average, or
            below 1/100 of it and not 0, replaces the range; None: only the first batch does.
    """
    fixed = fixed_zero_point(qtype, rule)
    constants = (-1.0 if number is None else number for number in (averaging_constant, copy_above))
    zero = (fixed is not None, fixed or 0, rule == "megengine")
    return Rule(*constants, FALL, qtype.reach, eps, *zero, qtype.quant_min, qtype.quant_max)


def reciprocal(scale: float) -> float:
    """Return ``1 / scale`` in float32, for a float32 number; infinity for 0."""
    # A quotient of float32 numbers that is rounded to float64 and then to float32 is as if rounded once.
    return float(ctypes.c_float(1.0 / scale).value) if scale else math.inf


def tail_of(grid: Grid | None, ceiling: float | None) -> Tail:
    """Return the constants by which compiled code applies a ReLU up to ``ceiling``, if any, and rounds to ``grid``.

    It does not round if ``grid``, which :func:`takes_grid` must accept, is None or switched off. ``ceiling`` is
    infinity for a plain ReLU, None without one.
    """
    tail, arguments = Tail(), grid_arguments(grid, None, ceiling)
    library().tail_of(ctypes.addressof(tail), arguments.rule, *arguments[2:4], *arguments[6:])
    return tail
