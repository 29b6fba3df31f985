"""Observing and quantizing an activation that was just computed, in place, and the gradient's mask.

Shared by the operators that end in ReLU and fake quantization. The ReLU is one number, its ``ceiling``: infinity for a
plain one, 6 for ReLU6, b for ``clamp(y, 0, b)``, and None where there is no ReLU. Other docstrings write
``relu?(y)`` for :func:`rectify`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.grid import Grid
from tritonq.qparams import is_readable
from tritonq.reference.fake_quant import fake_quantize, steps_
from tritonq.reference.min_max import extremes
from tritonq.reference.open_bounds import open_bounds
from tritonq.reference.quantizer_state import QuantizerState, active_flag, observe_range


def rectify(y: Tensor, ceiling: float | None) -> Tensor:
    """``min(max(y, 0), ceiling)``, differentiable; ``y`` itself where ``ceiling`` is None."""
    if ceiling is None:
        return y
    return F.relu(y) if ceiling == math.inf else F.hardtanh(y, 0.0, ceiling)


def rectify_(y: Tensor, ceiling: float | None) -> Tensor:
    """:func:`rectify` in place."""
    if ceiling is None:
        return y
    return y.relu_() if ceiling == math.inf else y.clamp_(0.0, ceiling)


def rectify_backward(dy: Tensor, y: Tensor, ceiling: float) -> Tensor:
    """The gradient of :func:`rectify` from its result ``y``: ``dy`` where ``0 < y < ceiling``, else 0."""
    if ceiling == math.inf:
        return torch.ops.aten.threshold_backward(dy, y, 0)  # type: ignore[no-any-return]
    # As the result holds it: rounded to its dtype.
    top = float(torch.tensor(ceiling, dtype=y.dtype))
    return torch.ops.aten.hardtanh_backward(dy, y, 0.0, top)  # type: ignore[no-any-return]


class Observed(NamedTuple):
    """A quantizer's state (see `observe_range`), and whether every value it saw is known to be finite."""

    state: QuantizerState
    finite: bool


def observe(y: Tensor, state: QuantizerState, ceiling: float | None) -> Observed:
    """Update a quantizer's range and qparams with ``relu?(y)``.

    Args:
        y: float32 or float64.
        state: per tensor.
        ceiling: of the ReLU before the quantizer.

    """
    if state.observing is None or (is_readable(y) and not bool(state.observing)):
        return Observed(state, False)
    low, high, nonfinite = extremes(y)
    if nonfinite is None:
        ends = (low, high) if ceiling is None else (low.clamp_(0.0, ceiling), high.clamp_(0.0, ceiling))
        return Observed(observe_range(state, *ends, ordered=True), True)
    if ceiling is not None:
        # The extremes of relu?(y); a batch without finite values keeps low > high.
        some = low <= high
        low, high = (torch.where(some, end.clamp(0.0, ceiling), end) for end in (low, high))
    return Observed(observe_range(state, low, high, nonfinite), False)


def quantize_(y: Tensor, state: QuantizerState, ceiling: float | None) -> Tensor:
    """``FQ(relu?(y))`` with the present qparams; overwrites ``y``."""
    active = active_flag(state)
    if active is False:
        return rectify_(y, ceiling)
    if active is not True:
        y = rectify_(y, ceiling)
        rounded = fake_quantize(y, Grid(state.scale, state.zero_point, state.qtype))
        return torch.where(active, rounded, y)
    scale, qtype = state.scale.to(y.dtype).view(()), state.qtype
    zero = 0 if state.zero_point is None else int(state.zero_point)
    lowest, highest = float(qtype.quant_min - zero), float(qtype.quant_max - zero)
    if ceiling is not None:
        lowest = max(lowest, 0.0)
        if ceiling < math.inf:
            # Rounding keeps order: to clip the steps at those of the ceiling is to clip the values, one pass less.
            highest = min(highest, float(steps_(scale.new_tensor(ceiling), scale, qtype.rounding)))
    return steps_(y, scale, qtype.rounding).clamp_(lowest, highest).mul_(scale)


def straight_through_(
    dy: Tensor,
    y: Tensor,
    state: QuantizerState | None,
    ceiling: float | None,
    finite: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``dy`` where neither ReLU nor the clip blocks it, else 0; zero at NaN.

    Args:
        dy: float32 or float64; broadcast to ``y``.
        y: what is quantized, unrounded; overwritten.
        state: the quantizer; None for none.
        ceiling: of the ReLU before it.
        finite: whether it is known that ``y`` is.
        out: where to write the result instead of ``y``; a finite ``y`` is then left alone.
    """
    active = False if state is None else active_flag(state)
    if isinstance(active, Tensor) and state is not None:
        return _masked(dy, y, state, ceiling, active)
    low, high = -math.inf, math.inf
    if active is True and state is not None:
        zero = 0 if state.zero_point is None else int(state.zero_point)
        lowest, highest = state.qtype.quant_min - zero, state.qtype.quant_max - zero
        low, high = open_bounds(float(state.scale), lowest, highest, state.qtype.rounding, y.dtype)
    elif ceiling is None:
        return dy
    if ceiling is not None:
        low, high = max(low, 0.0), min(high, ceiling)
    # Strictly between the bounds; NaN compares as inside, so that it is moved out first, and an infinite y in.
    if not finite:
        y.nan_to_num_(-torch.inf, torch.finfo(y.dtype).max, -torch.inf)
    return torch.ops.aten.hardtanh_backward.grad_input(  # type: ignore[no-any-return]
        dy, y, low, high, grad_input=y if out is None else out
    )


def _masked(dy: Tensor, y: Tensor, state: QuantizerState, ceiling: float | None, active: Tensor) -> Tensor:
    """:func:`straight_through_` without reading a value: for traced graphs and for other devices."""
    qtype, scale = state.qtype, state.scale.to(y.dtype).view(())
    steps = steps_(y.clone(), scale, qtype.rounding)
    code = steps if state.zero_point is None else steps + state.zero_point
    passes = ((code >= qtype.quant_min) & (code <= qtype.quant_max)) | ~active
    if ceiling is not None:
        # An infinite ceiling blocks nothing, an infinite y neither.
        passes = passes & (y > 0) if ceiling == math.inf else passes & (y > 0) & (y < ceiling)
    return torch.where(passes, dy, 0)
