"""Structures as tensors and text, and back: operators of ``torch.library`` take neither tuples nor dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonq.qparams import QuantizedType
from tritonq.reference.quantizer_state import QuantizerState

_NOTHING = "None"


class Packed(NamedTuple):
    """A quantizer's state: its buffers that are written, its switches, and the rest; all empty for no quantizer.

    Attributes:
        buffers: ``scale``, then ``zero_point``, ``min_val``, ``max_val`` and ``nonfinite_count`` where there are such.
        switches: ``active``, then ``observing`` where there is one.
        text: what else there is.
    """

    buffers: list[Tensor]
    switches: list[Tensor]
    text: str


_BUFFERS = ("scale", "zero_point", "min_val", "max_val", "nonfinite_count")
_SWITCHES = ("active", "observing")


def pack(state: QuantizerState | None) -> Packed:
    """The parts of a quantizer's state."""
    if state is None:
        return Packed([], [], "")
    buffers = [state.scale, state.zero_point, state.min_val, state.max_val, state.nonfinite_count]
    switches = [state.active, state.observing]
    present = "".join("0" if tensor is None else "1" for tensor in (*buffers, *switches))
    constants = f"{state.averaging_constant} {state.rule} {state.eps} {int(state.known)} {state.copy_above}"
    return Packed(
        [tensor for tensor in buffers if tensor is not None],
        [tensor for tensor in switches if tensor is not None],
        f"{present} {constants} {qtype_text(state.qtype)}",
    )


def unpack(buffers: list[Tensor], switches: list[Tensor], text: str) -> QuantizerState | None:
    """Inverse of :func:`pack`."""
    if not text:
        return None
    present, constants = _state_constants(text)
    tensors = iter((*buffers, *switches))
    found = {name: next(tensors) if there else None for name, there in present.items()}
    return QuantizerState(**found, **constants)  # type: ignore[arg-type]


def qtype_text(qtype: QuantizedType) -> str:
    """A quantized type as text."""
    return f"{qtype.quant_min} {qtype.quant_max} {int(qtype.symmetric)} {qtype.axis} {qtype.rounding}"


@cache
def qtype_of(text: str) -> QuantizedType:
    """Inverse of :func:`qtype_text`."""
    low, high, symmetric, axis, rounding = text.split(" ")
    kind: Any = rounding
    return QuantizedType(int(low), int(high), symmetric == "1", None if axis == _NOTHING else int(axis), kind)


@cache
def _state_constants(text: str) -> tuple[dict[str, bool], dict[str, Any]]:
    present, averaging, rule, eps, known, copy_above, qtype = text.split(" ", 6)
    return (
        {name: digit == "1" for name, digit in zip((*_BUFFERS, *_SWITCHES), present, strict=True)},
        {
            "averaging_constant": None if averaging == _NOTHING else float(averaging),
            "rule": rule,
            "eps": float(eps),
            "known": known == "1",
            "copy_above": None if copy_above == _NOTHING else float(copy_above),
            "qtype": qtype_of(qtype),
        },
    )


def own(value: Tensor, like: Tensor, *others: Tensor) -> Tensor:
    """Return ``value`` laid out as ``torch.empty_like(like)``, on memory that none of ``others`` uses.

    A result of an operator must not alias its inputs or another result, and must lie as its fake implementation says.
    """
    expected = torch.empty_like(like, dtype=value.dtype, device="meta").stride()
    taken = {tensor.untyped_storage().data_ptr() for tensor in others}
    if value.stride() == expected and value.untyped_storage().data_ptr() not in taken:
        return value
    return torch.empty_strided(value.shape, expected, dtype=value.dtype, device=value.device).copy_(value)


def laid_out_as(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an empty tensor, channels last where ``x`` is, else contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim(), torch.contiguous_format)
    is_last = not x.is_contiguous() and x.is_contiguous(memory_format=last)
    return x.new_empty(shape).contiguous(memory_format=last if is_last else torch.contiguous_format)


def qparams(state: QuantizerState | None, like: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of scale, zero point and switch (bool) for the backward; empty tensors stand for what there is not.

    Args:
        state: the snapshot that an operator made; None without a quantizer.
        like: on the device of the result.
        rows: the number of values of each copy, for a snapshot that may hold one value per row. Which of its tensors
            have one element, and which one per row, depends on the implementation; the copies do not.
    """
    scale, zero, active = fake_qparams(state, like, rows)
    if state is not None:
        scale.copy_(state.scale)
        active.copy_(state.active)
        if state.zero_point is not None:
            zero.copy_(state.zero_point)
    return scale, zero, active


def fake_qparams(state: QuantizerState | None, like: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors shaped as :func:`qparams` gives them, on the device of ``like``."""
    per_row = None if rows is None else (rows,)
    shape = (0,) if state is None else per_row or state.scale.shape
    has_zero = state is not None and state.zero_point is not None
    return (
        like.new_empty(shape, dtype=torch.float32),
        like.new_empty(shape if has_zero else (0,), dtype=torch.int32),
        like.new_empty(per_row or (1,), dtype=torch.bool),
    )
