"""Find out which quantizers an operator can take over, and return their grids in the form that operators take.

An operator that takes a quantizer over observes and rounds in one pass with its own computation; the quantizer's module
does not run.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from tritonq.arithmetic import real_number
from tritonq.fake_quantize import FakeQuantize
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.recomputation import is_recomputing
from tritonq.grid import Grid, RangeStatistics
from tritonq.nn.original_class import original_class
from tritonq.observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)

# By exact type: a subclass may observe in another way.
_RANGE_OBSERVERS = (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)


def observed_grid(quantizer: nn.Module, x: Tensor | None = None) -> tuple[Grid, RangeStatistics] | None:
    """Return grid and running range of a quantizer, for an operator that observes and rounds in its place.

    The range is always returned. In eval mode, and while activation checkpointing runs the forward again, it is marked
    as frozen: the operator reads it and observes nothing. Grid and range hold the buffers of quantizer and observer,
    switches too, not copies: the operator changes them in place. The zero point is None if it is always 0.

    None: the quantizer's module must run itself. That is so in each of these cases:

    - the quantizer is not exactly a `FakeQuantize`, rounds to a float format, or has groups;
    - its observer is of a class other than tritonq's min-max observers, such as a subclass of one, or was given a
      process group, whose ranks share the range;
    - quantizer or observer has hooks;
    - a momentum of MegEngine's rule waits for the next update;
    - ``x`` is empty.

    Args:
        quantizer: the quantizer; in training it forgets a range that came from the example inputs of ``prepare_qat``.
        x: an operand of the operation whose result is observed; None: it is not empty.
    """
    if not has_observed_grid(quantizer) or (x is not None and x.numel() == 0):
        return None
    quantizer = cast(FakeQuantize, quantizer)
    observer = cast(MinMaxObserver, quantizer.activation_post_process)
    if quantizer.training and not is_recomputing():
        quantizer.begin_anew()
    zero_point = None if observer.zero_point_is_zero else quantizer.zero_point
    return Grid(quantizer.scale, zero_point, quantizer.qtype, quantizer.fake_quant_enabled), observer.statistics(
        quantizer.observer_enabled,
        frozen=not quantizer.training or is_recomputing(),
        has_data=quantizer._qparams_known,
    )


def has_observed_grid(quantizer: nn.Module) -> bool:
    """Whether an operator can observe and round in a quantizer's place: :func:`observed_grid` then gives its grid.

    It can for exactly a `FakeQuantize` to integers, without groups, with one of tritonq's own min-max observers (no
    subclass) whose ``process_group`` is None. It can't if quantizer or observer has hooks. Nor can it if
    ``set_momentum`` gave an observer with ``rule="megengine"`` a momentum that still waits: such a momentum takes
    effect after the observer's next update.
    """
    if type(quantizer) is not FakeQuantize or has_hooks(quantizer) or quantizer.qtype.float_format is not None:
        return False
    if quantizer.qtype.group is not None:
        return False
    observer = quantizer.activation_post_process
    if type(observer) not in _RANGE_OBSERVERS or has_hooks(observer) or not isinstance(observer, MinMaxObserver):
        return False
    # Of a group, the range is reduced over ranks between observing and rounding. `observe` takes a new momentum up.
    return observer.process_group.process_group is None and observer.later_constant is None


def fixed_grid(quantizer: nn.Module) -> Grid | None:
    """Return the grid of a quantizer in eval mode, for an operator that rounds to it in the quantizer's place.

    None: the quantizer's module must run itself. That is so unless it is a plain `FakeQuantize` to integers with one
    scale, in eval mode, without hooks, whose scale and zero point were observed, loaded or set; before that, running it
    warns. A subclass is not plain. A quantizer that is switched off has a grid, too, whose switch is 0. The grid's
    tensors are the quantizer's own, not copies.
    """
    if type(quantizer) is not FakeQuantize or quantizer.training or has_hooks(quantizer):
        return None
    if quantizer.qtype.float_format is not None:
        return None
    return quantizer.grid() if quantizer.qtype.axis is None and quantizer.has_qparams() else None


def warn_if_unobserved(quantizer: nn.Module) -> None:
    """Warn (UserWarning) that values pass unrounded, if ``quantizer`` is a `FakeQuantize` without a known scale.

    Its scale was then neither observed, loaded nor set. It warns once for each quantizer, and never while
    ``torch.compile`` traces. Call it after an operator that observes and rounds in the quantizer's place.
    """
    if torch.compiler.is_compiling():
        return
    if isinstance(quantizer, FakeQuantize) and not quantizer.has_qparams():
        quantizer.warn_unobserved()


def input_grid(quantizer: FakeQuantizeBase | None) -> Grid | None:
    """Return the grid on which the values behind a quantizer lie, so that they can be kept as codes.

    None if the quantizer is None or per channel, if it doesn't round (such as while it is switched off, or before it
    has observed data or loaded a scale), and while ``torch.compile`` traces.
    """
    if quantizer is None or torch.compiler.is_compiling() or quantizer.qtype.axis is not None:
        return None
    return quantizer.grid() if quantizer.is_enabled_on_host() else None


def ceiling_of(activation: nn.Module | None) -> float | None:
    """Return the upper bound of a ReLU (infinity), ReLU6 or ``Hardtanh(0, b)``.

    None for any other module, such as one of a user's subclass of these or ``Hardtanh(-1, 1)``, and for None.
    """
    kind = original_class(activation)
    if kind is nn.ReLU:
        return math.inf
    if kind in (nn.ReLU6, nn.Hardtanh) and isinstance(activation, nn.Hardtanh):
        return bound_of_clip(activation.min_val, activation.max_val)
    return None


def bound_of_clip(low: object, high: object = None) -> float | None:
    """Return the upper bound ``high`` of a clip to ``[low, high]`` if the clip is a ReLU; None if it is none.

    ``high`` None stands for infinity. A clip is a ReLU if ``low`` is 0 and ``high`` is positive. Bounds that are no
    Python numbers, such as tensors, make none.
    """
    high = math.inf if high is None else high
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        return None
    return float(high) if low == 0 and high > 0 else None


def checked_ceiling(ceiling: float | None) -> float | None:
    """Return ``ceiling`` as a float, or None, if it can be the upper bound of a ReLU.

    Raises:
        TypeError: it is neither an int, a float nor None; a bool is refused, too.
        ValueError: it is not positive, or NaN.
    """
    if ceiling is None:
        return None
    number = real_number(ceiling)
    if number is None:
        raise TypeError(f"ceiling must be a number or None, got {ceiling!r}")
    if not number > 0:
        raise ValueError(f"ceiling must be positive, got {ceiling}")
    return number


def describe_relu(ceiling: float | None) -> str:
    """Return the text for ``repr``: "relu" for infinity, "relu up to 6" for 6, "" for None (no ReLU)."""
    if ceiling is None:
        return ""
    return "relu" if ceiling == math.inf else f"relu up to {ceiling:g}"


def has_hooks(module: nn.Module) -> bool:
    """Whether a module itself has forward or backward hooks or pre-hooks; those of children do not count."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
