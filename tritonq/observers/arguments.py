"""The quantized type that the arguments of torch.ao's observers (dtype, qscheme, …) describe."""

from __future__ import annotations

from dataclasses import replace

import torch

from tritonq.quantized_type import QUANTIZED_TYPES, QuantizedType, Rounding

_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_QSCHEMES = (torch.per_tensor_affine, torch.per_tensor_symmetric, *_PER_CHANNEL)
_SIGNED_DTYPES = {torch.qint8: 8, torch.int8: 8, torch.int16: 16, torch.qint32: 32, torch.int32: 32}
# torch.ao halves the range of 8-bit types alone.
_REDUCIBLE_BITS = 8
_UNSIGNED_DTYPES = {torch.quint8: 8, torch.uint8: 8, torch.quint4x2: 4}


def quantized_type(
    dtype: torch.dtype | QuantizedType | str,
    qscheme: torch.qscheme | None,
    reduce_range: bool,
    quant_min: int | None,
    quant_max: int | None,
    ch_axis: int | None,
    rounding: Rounding | None,
) -> QuantizedType:
    """Return the :class:`QuantizedType` that torch.ao's observer arguments describe.

    Args:
        dtype: a torch dtype, a type's name, or a QuantizedType, with which the others must agree.
        qscheme: None: per tensor, affine.
        reduce_range: for 8 bits, halve the smallest and largest code.
        quant_min: smallest code; None, with ``quant_max``: all codes of the dtype.
        quant_max: largest code.
        ch_axis: for schemes per channel; None: 0.
        rounding: None: "half_even", or that of the QuantizedType.

    Raises:
        ValueError: see :class:`ObserverBase`.
    """
    if (quant_min is None) != (quant_max is None):
        raise ValueError(f"quant_min and quant_max go together, got {quant_min} and {quant_max}")
    if qscheme is not None and qscheme not in _QSCHEMES:
        raise ValueError(
            f"unsupported qscheme {qscheme}: zero points are integers here; known: {', '.join(map(str, _QSCHEMES))}"
        )
    if isinstance(dtype, QuantizedType):
        _check_agreement(dtype, qscheme, reduce_range, ch_axis, rounding)
        return dtype if quant_min is None or quant_max is None else dtype.with_codes(quant_min, quant_max)
    axis = (ch_axis or 0) if qscheme in _PER_CHANNEL else None
    rounding = "half_even" if rounding is None else rounding
    if isinstance(dtype, str):
        if dtype not in QUANTIZED_TYPES:
            raise ValueError(f"unknown quantized type {dtype!r}; known: {', '.join(QUANTIZED_TYPES)}")
        named = replace(QUANTIZED_TYPES[dtype], axis=axis, rounding=rounding)
        return named if quant_min is None or quant_max is None else named.with_codes(quant_min, quant_max)
    signed = dtype in _SIGNED_DTYPES
    if not signed and dtype not in _UNSIGNED_DTYPES:
        known = ", ".join(map(str, (*_SIGNED_DTYPES, *_UNSIGNED_DTYPES)))
        raise ValueError(f"dtype must be one of {known}, a QuantizedType or its name, got {dtype}")
    full = QuantizedType.of(_SIGNED_DTYPES[dtype] if signed else _UNSIGNED_DTYPES[dtype], signed=signed)
    low, high = (full.quant_min, full.quant_max) if quant_min is None or quant_max is None else (quant_min, quant_max)
    if low < full.quant_min or high > full.quant_max:
        raise ValueError(
            f"quant_min..quant_max = {low}..{high} does not fit {dtype} ({full.quant_min}..{full.quant_max})"
        )
    if reduce_range and full.bits == _REDUCIBLE_BITS:
        low, high = low // 2, high // 2
    return QuantizedType(low, high, qscheme in _SYMMETRIC, axis, rounding)


def _check_agreement(
    qtype: QuantizedType,
    qscheme: torch.qscheme | None,
    reduce_range: bool,
    ch_axis: int | None,
    rounding: Rounding | None,
) -> None:
    """Raise ValueError if an argument contradicts ``qtype``, which the user gave as dtype.

    None and False agree with any.
    """
    if qscheme is not None and (qscheme in _PER_CHANNEL) != (qtype.axis is not None):
        raise ValueError(
            f"qscheme={qscheme} contradicts dtype={qtype}: give the type an axis (with_axis), or name it by a string"
            if qtype.axis is None
            else f"qscheme={qscheme} contradicts dtype={qtype}, which has an axis"
        )
    if qscheme is not None and (qscheme in _SYMMETRIC) != qtype.symmetric:
        raise ValueError(f"qscheme={qscheme} contradicts dtype={qtype}, whose symmetric is {qtype.symmetric}")
    if ch_axis is not None and qtype.axis is not None and ch_axis != qtype.axis:
        raise ValueError(f"ch_axis={ch_axis} contradicts dtype={qtype}")
    if reduce_range:
        raise ValueError(
            f"reduce_range=True contradicts dtype={qtype}, which says its codes; make a type of fewer codes"
        )
    if rounding is not None and rounding != qtype.rounding:
        raise ValueError(f"rounding={rounding!r} contradicts dtype={qtype}")
