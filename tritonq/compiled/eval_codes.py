"""`tritonq.reference.eval_codes`, compiled: one pass over memory each, and the reference's codes, bit for bit."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tritonq.compiled.arguments import is_plain, reciprocal
from tritonq.compiled.build import library
from tritonq.reference import eval_codes as reference
from tritonq.reference.eval_codes import CodeRange, Factors
from tritonq.reference.scratch import is_dense

codes_of_steps = reference.codes_of_steps


class _CodeRange(ctypes.Structure):
    """A `CodeRange` whose ties go to even, as ``eval_codes.cpp`` declares it: its ends in steps, and its zero."""

    _fields_ = (("lowest", ctypes.c_float), ("highest", ctypes.c_float), ("zero", ctypes.c_int32))


def codes_of_sums(sums: Tensor, factors: Factors, to: CodeRange, reach: float | None) -> Tensor | None:
    """Compute :func:`tritonq.reference.eval_codes.codes_of_sums` in C++: sums times factors, rounded to codes."""
    if not (
        to.half_even and is_plain(sums, factors.row) and sums.numel() and _has_channels_side_by_side(sums, factors)
    ):
        return reference.codes_of_sums(sums, factors, to, reach)
    codes, row = torch.empty_like(sums, dtype=torch.uint8), factors.row
    given = sums.data_ptr(), sums.numel(), row.data_ptr(), row.numel(), reach is not None, reach or 0.0
    exact = library().eval_codes_of_sums(*given, _numbers_of(to), codes.data_ptr())
    return codes if exact else None


def codes_of_values(x: Tensor, scale: float, to: CodeRange, largest: int | None) -> Tensor | None:
    """Compute :func:`tritonq.reference.eval_codes.codes_of_values` in C++: codes of float values."""
    if not (to.half_even and is_plain(x) and x.numel() and is_dense(x)):
        return reference.codes_of_values(x, scale, to, largest)
    codes, divides = torch.empty_like(x, dtype=torch.uint8), largest is not None
    factor = scale if divides else reciprocal(scale)
    ends = (-torch.inf, torch.inf) if largest is None else (float(-to.zero), float(largest - to.zero))
    into = _numbers_of(to), codes.data_ptr()
    is_within = library().eval_codes_of_values(x.data_ptr(), x.numel(), factor, divides, *ends, *into)
    return codes if is_within else None


def values_of_codes(codes: Tensor, scale: float, zero: int, form: torch.memory_format) -> Tensor:
    """Compute :func:`tritonq.reference.eval_codes.values_of_codes` in C++: the float values of codes."""
    codes = codes.contiguous(memory_format=form)
    values = torch.empty_like(codes, dtype=torch.float32, memory_format=form)
    library().eval_values(codes.data_ptr(), codes.numel(), scale, float(zero), values.data_ptr())
    return values


def codes_of_sum(
    a: Tensor, b: Tensor, starts: tuple[int, int], ratios: tuple[float, float], fixed: Tensor, to: CodeRange
) -> Tensor:
    """Compute :func:`tritonq.reference.eval_codes.codes_of_sum` in C++: codes of the sum of two tensors."""
    alike = _in_one_order(a, b) if to.half_even else None
    if alike is None:
        return reference.codes_of_sum(a, b, starts, ratios, fixed, to)
    a, b = alike
    codes = torch.empty_like(a)
    numbers = (*starts, *ratios, float(fixed))
    into = _numbers_of(to), codes.data_ptr()
    library().eval_codes_of_sum(a.data_ptr(), b.data_ptr(), a.numel(), *numbers, *into)
    return codes


def codes_of_product(
    a: Tensor, b: Tensor, zeros: tuple[int, int], ratio: float, fixed: Tensor, to: CodeRange
) -> Tensor:
    """Compute :func:`tritonq.reference.eval_codes.codes_of_product` in C++: codes of the product of two tensors."""
    if a.numel() < b.numel():
        a, b, zeros = b, a, (zeros[1], zeros[0])
    is_gate = a.dim() == 4 and a.shape != b.shape == (*a.shape[:2], 1, 1)
    alike = _in_one_order(a, b, is_gate) if to.half_even else None
    if alike is None:
        return reference.codes_of_product(a, b, zeros, ratio, fixed, to)
    a, b = alike
    codes = torch.empty_like(a)
    sizes = (a.shape[2] * a.shape[3], a.shape[1]) if is_gate else (1, a.numel())
    numbers = (*zeros, ratio, float(fixed))
    into = _numbers_of(to), codes.data_ptr()
    library().eval_codes_of_product(a.data_ptr(), a.numel(), *sizes, b.data_ptr(), *numbers, *into)
    return codes


def look_up_codes(codes: Tensor, table: Tensor) -> Tensor:
    """Compute :func:`tritonq.reference.eval_codes.look_up_codes` in C++: ``table[code]`` for each code."""
    results = torch.empty_strided(codes.shape, codes.stride(), dtype=torch.uint8)
    library().eval_look_up(codes.data_ptr(), codes.numel(), table.data_ptr(), results.data_ptr())
    return results


@lru_cache(maxsize=4096)
def _numbers_of(to: CodeRange) -> Any:
    """Return a range as compiled code takes it; the cache keeps it alive."""
    return ctypes.byref(_CodeRange(to.low - to.zero, to.high - to.zero, to.zero))


def _has_channels_side_by_side(sums: Tensor, factors: Factors) -> bool:
    """Whether factor i mod channels belongs to the i-th sum in memory."""
    by_channel = factors.by_channel
    return is_dense(sums) and (by_channel.numel() == 1 or sums.stride(-by_channel.dim()) == 1)


def _in_one_order(a: Tensor, b: Tensor, is_gate: bool = False) -> tuple[Tensor, Tensor] | None:
    """Return both operands with their elements in the order of ``a``; None where none fits.

    Args:
        a: codes.
        b: codes of the same shape.
        is_gate: whether ``b`` has instead one code for each image and channel of ``a``; then both are channels last.
    """
    if not a.numel() or not (is_gate or a.shape == b.shape):
        return None
    if is_gate:
        return a.contiguous(memory_format=torch.channels_last), b.contiguous()
    if a.stride() == b.stride():
        return (a, b) if is_dense(a) else None
    form = torch.channels_last if a.dim() == 4 and not a.is_contiguous() else torch.contiguous_format
    return a.contiguous(memory_format=form), b.contiguous(memory_format=form)
