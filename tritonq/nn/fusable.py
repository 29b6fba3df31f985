"""Which quantizers an operator can take over, and their state as the operator wants it."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

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
    """Return grid and range of a FakeQuantize over running ranges; None: its module must run by itself.

    The operator that takes them observes as the module would in its own forward. Modules with hooks run by themselves,
    so that hooks run; so do all where ``x``, an operand of what will be observed, is empty.
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
    """Whether :func:`observed_grid` returns one: of integers without groups, to which operators round alone."""
    if type(quantizer) is not FakeQuantize or has_hooks(quantizer) or quantizer.qtype.float_format is not None:
        return False
    if quantizer.qtype.group is not None:
        return False
    observer = quantizer.activation_post_process
    if type(observer) not in _RANGE_OBSERVERS or has_hooks(observer) or not isinstance(observer, MinMaxObserver):
        return False
    # Of a group, the range is reduced over ranks between observing and rounding.
    return observer.process_group.process_group is None


def fixed_grid(quantizer: nn.Module) -> Grid | None:
    """Return the grid of a per-tensor FakeQuantize in eval mode, for an operator that rounds to it.

    None: the module runs by itself. That is also so before it has observed anything: it then warns.
    """
    if type(quantizer) is not FakeQuantize or quantizer.training or has_hooks(quantizer):
        return None
    if quantizer.qtype.float_format is not None:
        return None
    return quantizer.grid() if quantizer.qtype.axis is None and quantizer.has_qparams() else None


def warn_if_unobserved(quantizer: nn.Module) -> None:
    """Give the quantizer's own warning where its operator let values pass for want of an observed range."""
    if torch.compiler.is_compiling():
        return
    if isinstance(quantizer, FakeQuantize) and not quantizer.has_qparams():
        quantizer.warn_unobserved()


def input_grid(quantizer: FakeQuantizeBase | None) -> Grid | None:
    """Return the grid that values of a per-tensor ``quantizer`` lie on; None while it is off or a graph is traced."""
    if quantizer is None or torch.compiler.is_compiling() or quantizer.qtype.axis is not None:
        return None
    return quantizer.grid() if quantizer.is_enabled_on_host() else None


def ceiling_of(activation: nn.Module | None) -> float | None:
    """Return the upper bound of an activation that is a ReLU, ReLU6 or ``Hardtanh(0, b)``; None for anything else."""
    kind = original_class(activation)
    if kind is nn.ReLU:
        return math.inf
    if kind in (nn.ReLU6, nn.Hardtanh) and isinstance(activation, nn.Hardtanh):
        return bound_of_clip(activation.min_val, activation.max_val)
    return None


def bound_of_clip(low: object, high: object = None) -> float | None:
    """Return the upper bound of the ReLU that clipping to these bounds (None: none) is; None where it is no ReLU."""
    high = math.inf if high is None else high
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        return None
    return float(high) if low == 0 and high > 0 else None


def checked_ceiling(ceiling: float | None) -> float | None:
    """Return ``ceiling`` if it can bound a ReLU, else TypeError or ValueError."""
    if ceiling is None:
        return None
    if isinstance(ceiling, bool) or not isinstance(ceiling, (int, float)):
        raise TypeError(f"ceiling must be a number or None, got {ceiling!r}")
    if not ceiling > 0:
        raise ValueError(f"ceiling must be positive, got {ceiling}")
    return float(ceiling)


def describe_relu(ceiling: float | None) -> str:
    """Return the text for a module's ``repr``: ``"relu"``, ``"relu up to 6"``, or nothing."""
    if ceiling is None:
        return ""
    return "relu" if ceiling == math.inf else f"relu up to {ceiling:g}"


def has_hooks(module: nn.Module) -> bool:
    """Whether someone listens to this module's calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
