"""`tritonq.reference.weight` for ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.backend import implementation
from tritonq.functional.traced.text import fake_qparams, own, pack, qparams, unpack
from tritonq.reference import weight as reference
from tritonq.reference.quantizer_state import QuantizerState
from tritonq.reference.weight import WeightCodes


def quantize_folded(rows: Tensor, fold: Tensor, state: QuantizerState | None, out: Tensor | None = None) -> WeightCodes:
    """See the reference; ``out`` is not used, and whether anything clips is never known."""
    if state is None:
        return reference.folded_codes(rows, fold, None)
    codes, unit, scale, zero_point, active = _quantize_folded(rows, fold, *pack(state))
    zero = None if state.zero_point is None else zero_point
    return WeightCodes(codes, unit, True, QuantizerState(scale, zero, active, state.qtype, known=True))


def folded_codes(rows: Tensor, fold: Tensor, state: QuantizerState | None, out: Tensor | None = None) -> WeightCodes:
    """See the reference; ``out`` is not used."""
    if state is None:
        return reference.folded_codes(rows, fold, None)
    codes, unit = _folded_codes(rows, fold, *pack(state))
    return WeightCodes(codes, unit, True, state)


def folded_backward(
    dcodes: Tensor,
    rows: Tensor,
    fold: Tensor,
    unit: Tensor,
    state: QuantizerState | None,
    clips: bool,
) -> tuple[Tensor, Tensor]:
    """See the reference; overwrites nothing."""
    return _folded_backward(dcodes, rows, fold, unit, *pack(state), clips)  # type: ignore[no-any-return]


@torch.library.custom_op("tritonq::quantize_folded", mutates_args=("buffers",))
def _quantize_folded(
    rows: Tensor, fold: Tensor, buffers: list[Tensor], switches: list[Tensor], text: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    state = unpack(buffers, switches, text)
    codes, unit, _, frozen = implementation("weight", rows).quantize_folded(rows, fold, state)
    unit = unit.clone(memory_format=torch.contiguous_format)
    return own(codes, rows, rows), unit, *qparams(frozen, rows, len(rows))


@_quantize_folded.register_fake
def _(
    rows: Tensor, fold: Tensor, buffers: list[Tensor], switches: list[Tensor], text: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_fake_codes(rows, fold), *fake_qparams(unpack(buffers, switches, text), rows, len(rows))


@torch.library.custom_op("tritonq::folded_codes", mutates_args=())
def _folded_codes(
    rows: Tensor, fold: Tensor, buffers: list[Tensor], switches: list[Tensor], text: str
) -> tuple[Tensor, Tensor]:
    codes, unit, _, _ = implementation("weight", rows).folded_codes(rows, fold, unpack(buffers, switches, text))
    return own(codes, rows, rows), unit.clone(memory_format=torch.contiguous_format)


@_folded_codes.register_fake
def _(rows: Tensor, fold: Tensor, buffers: list[Tensor], switches: list[Tensor], text: str) -> tuple[Tensor, Tensor]:
    return _fake_codes(rows, fold)


@torch.library.custom_op("tritonq::folded_backward", mutates_args=())
def _folded_backward(
    dcodes: Tensor,
    rows: Tensor,
    fold: Tensor,
    unit: Tensor,
    buffers: list[Tensor],
    switches: list[Tensor],
    text: str,
    clips: bool,
) -> tuple[Tensor, Tensor]:
    state = unpack(buffers, switches, text)
    drows, dfold = implementation("weight", rows).folded_backward(dcodes.clone(), rows, fold, unit, state, clips)
    return own(drows, rows, dcodes, rows), dfold


@_folded_backward.register_fake
def _(
    dcodes: Tensor,
    rows: Tensor,
    fold: Tensor,
    unit: Tensor,
    buffers: list[Tensor],
    switches: list[Tensor],
    text: str,
    clips: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows, dtype=fold.dtype), torch.empty_like(fold)


def _fake_codes(rows: Tensor, fold: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows, dtype=fold.dtype), fold.new_empty(len(rows))
