"""`tritonq.reference.min_max` for ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.backend import implementation
from tritonq.functional.traced.text import pack, unpack
from tritonq.qparams import QuantizedType, RangeRule
from tritonq.reference.quantizer_state import QuantizerState


def observe(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    enabled: Tensor | None,
    qtype: QuantizedType,
    averaging_constant: float | None,
    rule: RangeRule,
    eps: float,
    copy_above: float | None = None,
) -> None:
    """See the reference."""
    # An observer by itself keeps no qparams: stand-ins take its scale, and tell that there is none.
    alone = scale is None or zero_point is None
    state = QuantizerState(
        min_val if scale is None or zero_point is None else scale,
        None if alone else zero_point,
        nonfinite_count,
        qtype,
        min_val,
        max_val,
        nonfinite_count,
        enabled,
        averaging_constant,
        rule,
        eps,
        copy_above=copy_above,
    )
    buffers, switches, text = pack(state)
    _observe(x, buffers[1:] if alone else buffers, switches[1:], text)


def min_max(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference."""
    return _min_max(x, axis)  # type: ignore[no-any-return]


@torch.library.custom_op("tritonq::observe", mutates_args=("buffers",))
def _observe(x: Tensor, buffers: list[Tensor], enabled: list[Tensor], text: str) -> None:
    alone = len(buffers) == 3
    state = unpack([buffers[0], *buffers] if alone else buffers, [x, *enabled], text)
    if state is not None:
        implementation("min_max", x).observe(
            x,
            state.min_val,
            state.max_val,
            state.nonfinite_count,
            None if alone else state.scale,
            state.zero_point,
            state.observing,
            state.qtype,
            state.averaging_constant,
            state.rule,
            state.eps,
            state.copy_above,
        )


@_observe.register_fake
def _(x: Tensor, buffers: list[Tensor], enabled: list[Tensor], text: str) -> None:
    return None


@torch.library.custom_op("tritonq::min_max", mutates_args=())
def _min_max(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    low, high, nonfinite = implementation("min_max", x).min_max(x, axis)
    return low.clone(), high.clone(), nonfinite


@_min_max.register_fake
def _(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    shape = () if axis is None else (x.shape[axis],)
    low = x.new_empty(shape, dtype=torch.float32)
    return low, torch.empty_like(low), x.new_empty((), dtype=torch.int64)
