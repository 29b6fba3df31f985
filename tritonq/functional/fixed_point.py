"""Fixed-point rounding and the choice of the number of fraction bits, as functions on tensors.

A fixed-point number is ``code · 2^-frac_len``. The *fractional length* frac_len is its number of bits behind the binary
point, the *word length* the number of bits of its code.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from tritonq.arithmetic import whole_number
from tritonq.backend import Backend
from tritonq.functional.dispatch import implementation
from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.validate import check_axis, check_float_tensor
from tritonq.grid import Grid
from tritonq.qparams import is_readable
from tritonq.quantized_type import QuantizedType
from tritonq.reference.fixed_point import power_of_two

Statistic = Literal["std", "mean_abs", "rms"]

_WORD_LENGTHS = range(2, 17)
# Eight-bit numerators of the statistic-based choice, (signed, unsigned). Source: docs/fixed-point.md.
_NUMERATORS: dict[str, tuple[float, float]] = {"std": (40, 70), "mean_abs": (30, 30), "rms": (40, 50)}


def fixed_point_range(word_len: int, signed: bool) -> tuple[int, int]:
    """Return smallest and largest code: ``(-127, 127)`` for 8 bits signed, ``(0, 255)`` unsigned.

    Signed ``±(2^(word_len - 1) - 1)``, unsigned ``0 .. 2^word_len - 1``.

    Raises:
        ValueError: ``word_len`` is no integer in 2..16.
    """
    if whole_number(word_len) is None or word_len not in _WORD_LENGTHS:
        raise ValueError(f"word_len must be an integer in 2..16, got {word_len!r}")
    return (-(2 ** (word_len - 1)) + 1, 2 ** (word_len - 1) - 1) if signed else (0, 2**word_len - 1)


def fixed_point_type(word_len: int, signed: bool, axis: int | None = None) -> QuantizedType:
    """Return the type with codes ``±(2^(word_len - 1) - 1)`` (signed) or ``0 .. 2^word_len - 1`` and no zero point.

    It has one fractional length per index of ``axis``; for None one for the tensor. The unsigned type is not symmetric
    and so pins no zero point: make grids of it with ``zero_point=None``.

    Raises:
        TypeError: ``axis`` is neither an int nor None.
        ValueError: ``word_len`` is no integer in 2..16.
    """
    return QuantizedType(*fixed_point_range(word_len, signed), symmetric=signed, axis=axis)


def largest_frac_len(word_len: int, signed: bool) -> int:
    """Return the largest fractional length, ``word_len`` minus a sign bit if signed: 7 for 8 bits signed, 8 unsigned.

    ``word_len`` is not checked.
    """
    return word_len - int(signed)


def fixed_point_quantize(
    x: Tensor,
    frac_len: float | Tensor,
    word_len: int = 8,
    signed: bool = True,
    axis: int | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Round ``x`` to fixed point with ``frac_len`` fraction bits.

    ``y = clamp(round_half_even(x * 2^fl), lo, hi) * 2^-fl`` with codes ``±(2^(wl-1)-1)`` (signed) or ``0..2^wl-1``.
    Gradient of ``x``: ``dy`` where the rounded code lies strictly between ``lo`` and ``hi``, else 0: in an unsigned
    format the clamp at 0 is a ReLU. ``frac_len`` gets none. NaN stays NaN with zero gradient, infinities saturate.

    Args:
        x: any shape and strides; float32, float16, bfloat16 or float64.
        frac_len: fraction bits, 0..word_len - signed; a whole number, or a tensor of whole numbers, integers or floats,
            on ``x``'s device, of one element, or (x.shape[axis],) with ``axis``. Values of CUDA tensors are not
            checked, since that would synchronise.
        word_len: bits of a code, 2..16.
        signed: whether codes have a sign.
        axis: axis of ``x`` that ``frac_len`` runs along, may be negative; None: one ``frac_len`` for all of ``x``.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.

    Returns:
        Tensor of ``x``'s shape, dtype and memory format; all backends give the same bits.

    Raises:
        TypeError: ``x`` is no float tensor, or ``axis`` no int.
        ValueError: word length or fractional length out of range or not a whole number, an axis out of range, or a
            tensor ``frac_len`` of another shape or device.
        RuntimeError: ``backend="triton"`` where no kernel can run.

    Source: docs/fixed-point.md (F8Net's fix_quant).

    Examples:
        >>> fixed_point_quantize(torch.tensor([-1.0, 0.3, 0.375, 40.0]), 2)
        tensor([-1.0000,  0.2500,  0.5000, 31.7500])
    """
    check_float_tensor("x", x)
    axis = None if axis is None else check_axis(x, axis)
    checked = _check_frac_len(frac_len, x, word_len, signed, axis)
    return quantize_fixed_point(x, checked, fixed_point_type(word_len, signed, axis), backend)


def quantize_fixed_point(
    x: Tensor, frac_len: Tensor, qtype: QuantizedType, backend: Backend = "auto", enabled: Tensor | None = None
) -> Tensor:
    """Round ``x`` to ``clamp(round_half_even(x · 2^frac_len), lo, hi) · 2^-frac_len`` without checking the arguments.

    Gradient: ``dy`` where the rounded code lies strictly between the smallest code lo and the largest hi, else 0.

    Args:
        x: any shape; float32, float16, bfloat16 or float64. The result has its shape and dtype.
        frac_len: int32 or int64 on ``x``'s device; one element, or (x.shape[axis],) with the axis of ``qtype``.
        qtype: range of codes and axis, from :func:`fixed_point_type`.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.
        enabled: the switch, a one-element uint8 tensor on ``x``'s device: 0 lets values and gradients pass unchanged.
            None: on.
    """
    return fake_quantize(x, Grid(power_of_two(-frac_len), None, qtype, enabled), backend, blocks_ends=True)


def search_frac_len(
    x: Tensor, word_len: int = 8, signed: bool = True, *, axis: int | None = None, backend: Backend = "auto"
) -> Tensor:
    """Return the fractional length that rounds ``x`` with the least root mean square error; of several the smallest.

    Rounding is that of :func:`fixed_point_quantize`, clamp included. Every candidate ``0..word_len - signed`` is tried,
    in one read of ``x``. Values that are not finite don't count. The same input always gives the same result; nothing
    waits for a GPU.

    Args:
        x: any shape and strides; float32, float16, bfloat16 or float64.
        word_len: bits of a code, 2..16.
        signed: whether codes have a sign.
        axis: None for one result, else one per index of this axis; may be negative.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.

    Returns:
        int32 on ``x``'s device, 0-d or (x.shape[axis],); 0 where no value is finite, as in an empty tensor.

    Raises:
        TypeError: ``x`` is no float tensor, or ``axis`` no int.
        ValueError: ``word_len`` is no integer in 2..16, or ``axis`` is out of range.
        RuntimeError: ``backend="triton"`` where no kernel can run.

    Source: docs/fixed-point.md.

    Examples:
        >>> search_frac_len(torch.tensor([0.5, -1.25, 3.0]))
        tensor(2, dtype=torch.int32)
    """
    check_float_tensor("x", x)
    axis = None if axis is None else check_axis(x, axis)
    qtype, candidates = fixed_point_type(word_len, signed, axis), largest_frac_len(word_len, signed) + 1
    found: Tensor = implementation("fixed_point", x, backend).search_frac_len(x.detach(), qtype, candidates)
    return found


def statistic_frac_len(
    x: Tensor, word_len: int = 8, signed: bool = True, *, statistic: Statistic = "std", axis: int | None = None
) -> Tensor:
    """Return the fractional length that follows from one statistic of ``x``: cheaper than a search, and rougher.

    ``fl = clamp(floor(log2(c / m)), 0, word_len - signed)`` with m the statistic and, at 8 bits, c = 40, 30, 40
    (signed) or 70, 30, 50 (unsigned) for standard deviation (n - 1), mean absolute value and root mean square. At other
    word lengths c scales with ``2^(word_len - 8)``. m = 0 gives the largest fractional length. Values that are not
    finite don't count; of a single value the standard deviation is taken to be its magnitude.

    Args:
        x: any shape; float32, float16, bfloat16 or float64.
        word_len: bits of a code, 2..16.
        signed: whether codes have a sign.
        statistic: ``"std"``, ``"mean_abs"`` or ``"rms"``.
        axis: None for one result, else one per index of this axis; may be negative.

    Returns:
        int32 on ``x``'s device, 0-d or (x.shape[axis],); the largest length where no value is finite, as in an empty
        tensor.

    Raises:
        TypeError: ``x`` is no float tensor, or ``axis`` no int.
        ValueError: an unknown statistic, ``word_len`` is no integer in 2..16, or ``axis`` is out of range.

    Source: docs/fixed-point.md.

    Examples:
        >>> [int(statistic_frac_len(torch.tensor([-size, size]), statistic="rms")) for size in (1.0, 20.0)]
        [5, 1]
    """
    check_float_tensor("x", x)
    axis = None if axis is None else check_axis(x, axis)
    fixed_point_range(word_len, signed)
    if statistic not in _NUMERATORS:
        raise ValueError(f"unknown statistic {statistic!r}; known: {', '.join(get_args(Statistic))}")
    rows = x.detach().double()
    metric = _metric(rows.reshape(-1) if axis is None else rows.movedim(axis, 0).flatten(1), statistic)
    numerator = _NUMERATORS[statistic][0 if signed else 1] * 2.0 ** (word_len - 8)
    # frexp gives a mantissa in [0.5, 1): its exponent is floor(log2) + 1, exactly.
    exponent = torch.frexp(numerator / metric).exponent - 1
    largest = largest_frac_len(word_len, signed)
    return torch.where(metric > 0, exponent.clamp(0, largest), largest).to(torch.int32)


def _metric(rows: Tensor, statistic: Statistic) -> Tensor:
    """Return a statistic of the finite values of each row (the last axis) of a float64 tensor; 0 if a row has none.

    A single value has no standard deviation: its magnitude is returned.
    """
    finite = torch.isfinite(rows)
    values, count = torch.where(finite, rows, 0.0), finite.sum(-1)
    divisor = count.clamp(min=1)
    if statistic == "mean_abs":
        return values.abs().sum(-1) / divisor
    rms = (values.square().sum(-1) / divisor).sqrt()
    if statistic == "rms":
        return rms
    distances = torch.where(finite, values - (values.sum(-1) / divisor).unsqueeze(-1), 0.0)
    return torch.where(count > 1, (distances.square().sum(-1) / (count - 1).clamp(min=1)).sqrt(), rms)


def _check_frac_len(frac_len: float | Tensor, x: Tensor, word_len: int, signed: bool, axis: int | None) -> Tensor:
    """Return ``frac_len`` as an int32 tensor on ``x``'s device, (1,) or (x.shape[axis],).

    Raises:
        ValueError: a word length or fractional length out of range or not a whole number, or a tensor of another shape
            or on another device.
    """
    fixed_point_range(word_len, signed)
    largest = largest_frac_len(word_len, signed)
    shape = (1,) if axis is None else (x.shape[axis],)
    if not isinstance(frac_len, Tensor):
        length = whole_number(frac_len, of_floats=True)
        if length is None:
            raise ValueError(f"frac_len must be a whole number in 0..{largest}, got {frac_len!r}")
        frac_len = torch.full(shape, length, dtype=torch.int32, device=x.device)
    elif frac_len.is_complex() or frac_len.dtype == torch.bool:
        raise ValueError(f"frac_len must hold whole numbers, got {frac_len.dtype}")
    elif frac_len.is_floating_point() and is_readable(frac_len) and not bool((frac_len == frac_len.round()).all()):
        raise ValueError(f"frac_len must hold whole numbers, got {frac_len.flatten()[:8].tolist()}")
    if frac_len.device != x.device:
        raise ValueError(f"frac_len is on {frac_len.device}, the input on {x.device}")
    if frac_len.numel() != shape[0] or frac_len.dim() > 1 or (axis is not None and frac_len.dim() != 1):
        raise ValueError(f"frac_len must have shape {shape}, got {tuple(frac_len.shape)}")
    if is_readable(frac_len) and not bool(((frac_len >= 0) & (frac_len <= largest)).all()):
        kind = "signed" if signed else "unsigned"
        raise ValueError(
            f"frac_len must be in 0..{largest} for {word_len}-bit {kind} codes, got {frac_len.flatten()[:8].tolist()}"
        )
    return frac_len.reshape(shape).to(torch.int32)
