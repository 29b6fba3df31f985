"""The state of a range quantizer as plain tensors, for operators that observe and quantize on their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tritonq.qparams import QuantizedType, RangeRule, is_readable, range_to_qparams
from tritonq.reference.min_max import merge_range_, update_range

# Never written to.
_SWITCH = {value: torch.tensor([value]) for value in (False, True)}


class QuantizerState(NamedTuple):
    """What a fake quantizer with a minimum and maximum observer knows; tensors are its buffers, updated in place.

    Attributes:
        scale: float32, one element or (channels,).
        zero_point: int32, as ``scale``; None stands for zero always.
        active: uint8, one element; 0 passes values through.
        qtype: the grid.
        min_val: float32 running minimum, 0-d or (channels,); None where ranges are kept elsewhere.
        max_val: as ``min_val``.
        nonfinite_count: int64, 0-d.
        observing: uint8, one element; 0 freezes the range. None: do not observe (eval mode, ranges kept elsewhere).
        averaging_constant: see :func:`tritonq.reference.min_max.update_range`.
        rule: see :func:`tritonq.qparams.range_to_qparams`.
        eps: floor under the scale.
        known: whether the qparams are known to rest on data; else ``min_val <= max_val`` tells.
        copy_above: see :func:`tritonq.reference.min_max.update_range`.
    """

    scale: Tensor
    zero_point: Tensor | None
    active: Tensor
    qtype: QuantizedType
    min_val: Tensor | None = None
    max_val: Tensor | None = None
    nonfinite_count: Tensor | None = None
    observing: Tensor | None = None
    averaging_constant: float | None = None
    rule: RangeRule = "torch"
    eps: float = 0.0
    known: bool = False
    copy_above: float | None = None


def observe_range(
    state: QuantizerState, low: Tensor, high: Tensor, nonfinite: Tensor | None = None, ordered: bool = False
) -> QuantizerState:
    """Merge a batch's range into the running one and write the qparams that follow.

    Args:
        state: the quantizer; nothing happens while it is not observing.
        low: smallest finite value of the batch, shaped as ``state.min_val``; +inf where there is none.
        high: largest, or -inf.
        nonfinite: number of values that were skipped; None for zero.
        ordered: whether ``low <= high``, both finite, is known, and so that nothing was skipped.

    Returns:
        The state, and that its qparams rest on data where that is known.
    """
    if state.observing is None or state.min_val is None or state.max_val is None:
        return state
    if is_readable(state.observing):
        if not bool(state.observing):
            return state
        if ordered:
            merge_range_(
                *(low.float(), high.float(), state.min_val, state.max_val, state.scale, state.zero_point, state.qtype),
                *(state.averaging_constant, state.rule, state.eps, state.copy_above),
            )
            return state._replace(known=True)
        enabled = None
    else:
        enabled = state.observing.view(()) != 0
    new_min, new_max = update_range(
        low.float(), high.float(), state.min_val, state.max_val, state.averaging_constant, state.copy_above
    )
    _assign(state.min_val, new_min, enabled)
    _assign(state.max_val, new_max, enabled)
    if nonfinite is not None and state.nonfinite_count is not None:
        _assign(state.nonfinite_count, state.nonfinite_count + nonfinite, enabled)
    scale, zero_point = range_to_qparams(state.min_val, state.max_val, state.qtype, rule=state.rule, eps=state.eps)
    _assign(state.scale, scale.view_as(state.scale), enabled)
    if state.zero_point is not None:
        _assign(state.zero_point, zero_point.view_as(state.zero_point), enabled)
    return state


def active_flag(state: QuantizerState) -> bool | Tensor:
    """Whether values are rounded: switched on, and observed. A bool where looking is free, else a 0-d bool tensor."""
    flag = state.active
    seen = None
    if not state.known and state.min_val is not None and state.max_val is not None:
        seen = (state.min_val <= state.max_val).any()
    if is_readable(flag):
        return bool(flag) and (seen is None or bool(seen))
    flag = flag.view(())
    return flag != 0 if seen is None else (flag != 0) & seen


def snapshot(state: QuantizerState) -> QuantizerState:
    """Copies of the qparams for a later backward: observers and switches change their buffers in place."""
    active = active_flag(state)
    return QuantizerState(
        state.scale.clone(),
        None if state.zero_point is None else state.zero_point.clone(),
        _SWITCH[active] if isinstance(active, bool) else active.view(1),
        state.qtype,
        known=True,
    )


def _assign(buffer: Tensor, value: Tensor, enabled: Tensor | None) -> None:
    buffer.copy_(value if enabled is None else torch.where(enabled, value, buffer))
