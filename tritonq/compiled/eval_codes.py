"""Codes of layers in eval mode and of converted models in C++: one pass over memory each, the reference's codes.

Codes are uint8, counted from 0 (the smallest code of their grid). *Steps* are values divided by their scale; a
`CodeRange` says how they become codes: ``clip(round(step) + zero, low, high)``, and how ties are rounded. What the
compiled code does not take, such as ties away from zero, `tritonq.reference.eval_codes` computes.
"""

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
    """Return ``clip(round(sums * factors) + zero, low, high)``, uint8; None if a sum reaches ``reach``.

    Args:
        sums: float32 whole numbers, not empty if ``reach`` is given; may be overwritten.
        factors: for each channel, how many steps of the result's scale a sum of 1 is: in ``by_channel``, a tensor that
            broadcasts against the sums, and in ``row``, a vector; `tritonq.reference.eval_codes.repeated` makes both.
        to: zero, ends and ties.
        reach: bound that the magnitude of every sum must stay below; None: sums are known to be exact.
    """
    if not (
        to.half_even and is_plain(sums, factors.row) and sums.numel() and _has_channels_side_by_side(sums, factors)
    ):
        return reference.codes_of_sums(sums, factors, to, reach)
    codes, row = torch.empty_like(sums, dtype=torch.uint8), factors.row
    given = sums.data_ptr(), sums.numel(), row.data_ptr(), row.numel(), reach is not None, reach or 0.0
    exact = library().eval_codes_of_sums(*given, _numbers_of(to), codes.data_ptr())
    return codes if exact else None


def codes_of_values(x: Tensor, scale: float, to: CodeRange, largest: int | None) -> Tensor | None:
    """Return the codes ``round(x / scale) + zero``, uint8; None if a value is NaN.

    With ``largest`` it is None, too, if a code would lie beyond 0..``largest``.

    Args:
        x: float32, not empty.
        scale: of the codes. If ties go to even, values are multiplied by its reciprocal; else, and with ``largest``,
            they are divided by it.
        to: zero, ends and ties; with ``largest`` nothing is clipped, and ties go to even.
        largest: the largest code; None: codes beyond the ends of ``to`` are clipped.
    """
    if not (to.half_even and is_plain(x) and x.numel() and is_dense(x)):
        return reference.codes_of_values(x, scale, to, largest)
    codes, divides = torch.empty_like(x, dtype=torch.uint8), largest is not None
    factor = scale if divides else reciprocal(scale)
    ends = (-torch.inf, torch.inf) if largest is None else (float(-to.zero), float(largest - to.zero))
    into = _numbers_of(to), codes.data_ptr()
    is_within = library().eval_codes_of_values(x.data_ptr(), x.numel(), factor, divides, *ends, *into)
    return codes if is_within else None


def values_of_codes(codes: Tensor, scale: float, zero: int, form: torch.memory_format) -> Tensor:
    """Return ``(code - zero) * scale`` as float32.

    Args:
        codes: uint8, of any memory format.
        scale: the float32 scale.
        zero: the code of the value 0.
        form: memory format of the result.
    """
    codes = codes.contiguous(memory_format=form)
    values = torch.empty_like(codes, dtype=torch.float32, memory_format=form)
    library().eval_values(codes.data_ptr(), codes.numel(), scale, float(zero), values.data_ptr())
    return values


def codes_of_sum(
    a: Tensor, b: Tensor, starts: tuple[int, int], ratios: tuple[float, float], fixed: Tensor, to: CodeRange
) -> Tensor:
    """Return ``clip(round(fma(a - start_a, ratio_a, fma(b - start_b, ratio_b, fixed))) + zero, low, high)``, uint8.

    fma is a product and a sum in float32, rounded once.

    Args:
        a: uint8 codes.
        b: uint8 codes of the same shape.
        starts: ``(start_a, start_b)``: the code that is subtracted from each operand's codes.
        ratios: ``(ratio_a, ratio_b)``: each operand's scale over that of the result; negative to subtract the operand.
        fixed: the constant term, float32, 0-d.
        to: zero, ends and ties of the result.
    """
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
    """Return ``clip(round((a - zero_a) * (b - zero_b) * ratio + fixed) + zero, low, high)``, uint8.

    Each operation is rounded to float32.

    Args:
        a: uint8 codes.
        b: uint8 codes; one of both may broadcast to the shape of the other.
        zeros: ``(zero_a, zero_b)``: the code of the value 0 of each operand.
        ratio: the product of both scales over that of the result.
        fixed: the constant term, float32, 0-d.
        to: zero, ends and ties of the result.
    """
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
    """Return ``table[code]`` for each code, uint8, in the order of ``codes``.

    Args:
        codes: uint8, without gaps in memory, such as contiguous or channels last.
        table: uint8, contiguous, with an entry for each code up to the largest in ``codes``, which is not checked.
    """
    results = torch.empty_strided(codes.shape, codes.stride(), dtype=torch.uint8)
    library().eval_look_up(codes.data_ptr(), codes.numel(), table.data_ptr(), results.data_ptr())
    return results


@lru_cache(maxsize=4096)
def _numbers_of(to: CodeRange) -> Any:
    """Return the address of a :class:`_CodeRange` with the ends and zero of ``to``; the cache keeps it alive."""
    return ctypes.byref(_CodeRange(to.low - to.zero, to.high - to.zero, to.zero))


def _has_channels_side_by_side(sums: Tensor, factors: Factors) -> bool:
    """Whether ``sums`` are dense and factor i mod channels belongs to the i-th of them in memory."""
    by_channel = factors.by_channel
    return is_dense(sums) and (by_channel.numel() == 1 or sums.stride(-by_channel.dim()) == 1)


def _in_one_order(a: Tensor, b: Tensor, is_gate: bool = False) -> tuple[Tensor, Tensor] | None:
    """Return both operands with their elements in one memory order, copied if they must be.

    The result is None for an empty ``a``, for shapes that do not fit, and for equal strides that are not dense.

    Args:
        a: codes.
        b: codes of the same shape.
        is_gate: whether ``b`` has instead one code for each image and channel of ``a``, (n, c, 1, 1); ``a`` then comes
            as channels last, ``b`` contiguous.
    """
    if not a.numel() or not (is_gate or a.shape == b.shape):
        return None
    if is_gate:
        return a.contiguous(memory_format=torch.channels_last), b.contiguous()
    if a.stride() == b.stride():
        return (a, b) if is_dense(a) else None
    form = torch.channels_last if a.dim() == 4 and not a.is_contiguous() else torch.contiguous_format
    return a.contiguous(memory_format=form), b.contiguous(memory_format=form)
