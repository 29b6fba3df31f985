"""Observing and quantizing an activation that was just computed, in place, and the gradient's mask.

Shared by the operators that end in ReLU and fake quantization.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonq.qparams import is_readable, round_half_away
from tritonq.reference.fake_quant import fake_quantize
from tritonq.reference.min_max import extremes
from tritonq.reference.open_bounds import open_bounds
from tritonq.reference.quantizer_state import QuantizerState, active_flag, observe_range


def observe(y: Tensor, state: QuantizerState, relu: bool) -> QuantizerState:
    """Update a quantizer's range and qparams with ``relu?(y)``.

    Args:
        y: float32 or float64.
        state: per tensor.
        relu: whether the quantizer sees ``relu(y)``.

    Returns:
        See :func:`tritonq.reference.quantizer_state.observe_range`.
    """
    if state.observing is None or (is_readable(y) and not bool(state.observing)):
        return state
    low, high, nonfinite = extremes(y)
    if nonfinite is None:
        ends = (low.clamp_(min=0), high.clamp_(min=0)) if relu else (low, high)
        return observe_range(state, *ends, ordered=True)
    if relu:
        # The extremes of relu(y); a batch without finite values keeps low > high.
        some = low <= high
        low, high = (torch.where(some, end.clamp(min=0), end) for end in (low, high))
    return observe_range(state, low, high, nonfinite)


def quantize_(y: Tensor, state: QuantizerState, relu: bool) -> Tensor:
    """``FQ(relu?(y))`` with the present qparams; overwrites ``y``."""
    active = active_flag(state)
    if active is False:
        return y.relu_() if relu else y
    if active is not True:
        y = y.relu_() if relu else y
        qtype = state.qtype
        rounded = fake_quantize(
            y, state.scale, state.zero_point, qtype.quant_min, qtype.quant_max, None, qtype.rounding
        )
        return torch.where(active, rounded, y)
    scale, qtype = state.scale.to(y.dtype).view(()), state.qtype
    zero = 0 if state.zero_point is None else int(state.zero_point)
    lowest = qtype.quant_min - zero
    steps = y.mul_(scale.reciprocal()).round_() if qtype.rounding == "half_even" else round_half_away(y.div_(scale))
    return steps.clamp_(max(lowest, 0) if relu else lowest, qtype.quant_max - zero).mul_(scale)


def straight_through_(dy: Tensor, y: Tensor, state: QuantizerState | None, relu: bool) -> Tensor:
    """``dy`` where neither ReLU nor the clip blocks it, else 0; zero at NaN. Overwrites ``y``, which is unrounded."""
    active = False if state is None else active_flag(state)
    if isinstance(active, Tensor) and state is not None:
        return _masked(dy, y, state, relu, active)
    low, high = -math.inf, math.inf
    if active is True and state is not None:
        zero = 0 if state.zero_point is None else int(state.zero_point)
        lowest, highest = state.qtype.quant_min - zero, state.qtype.quant_max - zero
        low, high = open_bounds(float(state.scale), lowest, highest, state.qtype.rounding, y.dtype)
    elif not relu:
        return dy
    if relu:
        low = max(low, 0.0)
    # Strictly between the bounds; NaN compares as inside, so that it is moved out first, and an infinite y in.
    y.nan_to_num_(-torch.inf, torch.finfo(y.dtype).max, -torch.inf)
    return torch.ops.aten.hardtanh_backward.grad_input(dy, y, low, high, grad_input=y)  # type: ignore[no-any-return]


def _masked(dy: Tensor, y: Tensor, state: QuantizerState, relu: bool, active: Tensor) -> Tensor:
    """:func:`straight_through_` without reading a value: for traced graphs and for other devices."""
    qtype, scale = state.qtype, state.scale.to(y.dtype).view(())
    steps = y.mul(scale.reciprocal()).round() if qtype.rounding == "half_even" else round_half_away(y / scale)
    code = steps if state.zero_point is None else steps + state.zero_point
    passes = ((code >= qtype.quant_min) & (code <= qtype.quant_max)) | ~active
    return torch.where(passes & (y > 0) if relu else passes, dy, 0)
