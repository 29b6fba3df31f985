"""Codes of layers in eval mode and of converted models, uint8 and counted from 0 (the smallest code of their grid).

They are made of integer sums, of float values, or of other codes. *Steps* are values divided by their scale; a
:class:`CodeRange` says how they become codes: ``clip(round(step) + zero, low, high)``. Unlike the operators of training
these have no Triton kernel: on a GPU layers in eval mode compute on values.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from tritonq.arithmetic import round_half_away
from tritonq.reference.scratch import in_memory_order, is_dense

# Steps up to here, plus a zero point, fit into int32.
LARGEST_STEP = 2.0**30
_MAX_CODES = 256
# Sums in one row of a multiplication; torch's loop starts anew with every row.
_ROW = 2048


@dataclass(frozen=True)
class CodeRange:
    """How steps become codes: ``code = clip(round(step) + zero, low, high)``.

    Attributes:
        zero: the code of step 0.
        low: smallest code of a result, at least 0.
        high: largest code of a result, up to 255.
        half_even: whether ties go to the even step; else away from 0.
        largest_step: largest absolute value of a step, infinity if unknown. Some of torch's kernels need one below
            :data:`LARGEST_STEP`, 2^30.
    """

    zero: int
    low: int
    high: int
    half_even: bool
    largest_step: float = math.inf


@dataclass(frozen=True)
class Factors:
    """One float32 factor for each channel of a layer's sums, or one for all.

    Attributes:
        by_channel: shaped to broadcast against the sums.
        row: the same factors in a vector, all channels one after the other, several times: :func:`multiply_` takes a
            part of it for sums that lie in memory with channels innermost.
    """

    by_channel: Tensor
    row: Tensor


def repeated(by_channel: Tensor) -> Factors:
    """Return factors with their row: all channels' factors, one after the other, 2^k times.

    2^k is the largest power of 2 for which the row has at most 2048 numbers; 1 if there are more channels than that.

    Args:
        by_channel: float32, shaped to broadcast against the sums; one element or one per channel.
    """
    channels = by_channel.numel()
    repeats = 1 << (_ROW // channels).bit_length() - 1 if 0 < channels <= _ROW else 1
    return Factors(by_channel, by_channel.flatten().repeat(repeats))


def codes_of_steps(steps: Tensor, to: CodeRange) -> Tensor:
    """Return ``clip(round(steps) + zero, low, high)`` of values that were divided by their scale.

    Args:
        steps: float32 ``value / scale`` on the CPU, no NaN; may be overwritten.
        to: zero, ends and ties.

    Returns:
        uint8, in the shape and memory order of ``steps``.
    """
    if to.half_even and has_one_pass_rounding(to.largest_step < LARGEST_STEP):
        # torch adds the zero point before it rounds, which moves ties.
        codes = _round_in_one_pass(steps.round_() if to.zero else steps, to.zero)
        # Now clipped to 0 and 255.
        if to.low > 0:
            codes.clamp_(min=to.low)
        return codes if to.high >= _MAX_CODES - 1 else codes.clamp_(max=to.high)
    rounded = steps.round_() if to.half_even else round_half_away(steps)
    return rounded.add_(to.zero).clamp_(to.low, to.high).to(torch.uint8)


def codes_of_sums(sums: Tensor, factors: Factors, to: CodeRange, reach: float | None) -> Tensor | None:
    """Return ``clip(round(sums * factors) + zero, low, high)``; None if a sum reaches ``reach``.

    float32 may have rounded such a sum, so the caller has to compute the sums in another way.

    Args:
        sums: float32 whole numbers, channels on the axis where ``factors.by_channel`` has them; overwritten unless None
            is returned. Not empty if ``reach`` is given, else torch raises RuntimeError.
        factors: for each channel, how many steps of the result's scale a sum of 1 is.
        to: zero, ends and ties.
        reach: bound that the magnitude of every sum must stay below; None: sums are known to be exact.

    Returns:
        uint8, in the shape and memory order of ``sums``.
    """
    if reach is not None and not is_within(sums, reach):
        return None
    return codes_of_steps(multiply_(sums, factors), to)


def is_within(sums: Tensor, reach: float) -> bool:
    """Whether the magnitude of every sum is below ``reach``; False at NaN.

    ``sums`` is not empty, else torch raises RuntimeError.
    """
    # In the order in which they lie: torch would copy any other.
    least, most = torch.aminmax(in_memory_order(sums) if is_dense(sums) else sums)
    return -reach < float(least) and float(most) < reach


def multiply_(sums: Tensor, factors: Factors) -> Tensor:
    """Multiply ``sums`` by each channel's factor in place, and return them.

    If channels lie innermost in memory, several pixels at a time are multiplied by a part of ``factors.row``.

    Args:
        sums: float32, any shape, channels on the axis where ``factors.by_channel`` has them.
        factors: one for each channel, or one for all.
    """
    by_channel, channels = factors.by_channel, factors.by_channel.numel()
    pixels = sums.numel() // channels
    # The largest power of two that divides the pixels and makes no row too long.
    repeats = min(pixels & -pixels, factors.row.numel() // channels)
    if repeats <= 1 or sums.stride(-by_channel.dim()) != 1 or not is_dense(sums):
        return sums.mul_(by_channel)
    width = repeats * channels
    sums.as_strided((pixels // repeats, width), (width, 1)).mul_(factors.row[:width])
    return sums


def codes_of_values(x: Tensor, scale: float, to: CodeRange, largest: int | None) -> Tensor | None:
    """Return the codes ``round(x / scale) + zero``; None at NaN, or with ``largest`` if one is outside 0..``largest``.

    Args:
        x: float32, not empty, else torch raises RuntimeError; not changed.
        scale: of the codes. If ties go to even, values are multiplied by its reciprocal, as in `fake_quantize`; else
            they are divided by it, and so they are always with ``largest``.
        to: zero, ends and ties; with ``largest`` only its zero is read: nothing is clipped, and ties go to even.
        largest: the largest code; None: codes beyond the ends of ``to`` are clipped.

    Returns:
        uint8, in the shape of ``x``, and in its order in memory if ``x`` is contiguous or channels_last.
    """
    if largest is None:
        low, high = (float(end) for end in torch.aminmax(x))
        if math.isnan(low):
            return None
        step, to = torch.tensor(scale), replace(to, largest_step=max(-low, high) / scale)
        return codes_of_steps(x.mul(step.reciprocal()) if to.half_even else x.div(step), to)
    steps = (x / scale).round_().add_(to.zero)
    least, most = torch.aminmax(steps)
    # False for NaN as well.
    return steps.to(torch.uint8) if float(least) >= 0 and float(most) <= largest else None


def values_of_codes(codes: Tensor, scale: float, zero: int, form: torch.memory_format) -> Tensor:
    """Return ``(code - zero) * scale`` as float32.

    Args:
        codes: uint8, in any order.
        scale: the float32 scale.
        zero: the code of the value 0.
        form: memory format of the result, such as ``torch.channels_last``.
    """
    values = codes.to(torch.float32, memory_format=form)
    if zero:
        values.sub_(zero)
    return values.mul_(scale)


def codes_of_sum(
    a: Tensor, b: Tensor, starts: tuple[int, int], ratios: tuple[float, float], fixed: Tensor, to: CodeRange
) -> Tensor:
    """Return ``clip(round(fma(a - start_a, ratio_a, fma(b - start_b, ratio_b, fixed))) + zero, low, high)``.

    fma is a product and a sum in float32, rounded once.

    Args:
        a: uint8 codes.
        b: uint8 codes of the same shape.
        starts: start_a and start_b, the codes that are subtracted from those of ``a`` and ``b``.
        ratios: ratio_a and ratio_b, each operand's scale over that of the result; negative to subtract the operand.
        fixed: what is added in steps of the result, float32, 0-d: makes up for codes that are not counted from the
            code of the value 0, in the operands (``starts``) or in the result (``to.zero``).
        to: zero, ends and ties of the result.

    Returns:
        uint8, shaped as ``a``.

    Source: QLinearAdd of ONNX Runtime; `tritonq.functional.integer_joins.integer_add`.
    """
    total = _counted_from(b, starts[1])
    total = torch.add(fixed, total, alpha=ratios[1], out=total)
    total = torch.add(total, _counted_from(a, starts[0]), alpha=ratios[0], out=total)
    return codes_of_steps(total, to)


def codes_of_product(
    a: Tensor, b: Tensor, zeros: tuple[int, int], ratio: float, fixed: Tensor, to: CodeRange
) -> Tensor:
    """Return ``clip(round((a - zero_a) * (b - zero_b) * ratio + fixed) + zero, low, high)``.

    Each operation is rounded to float32.

    Args:
        a: uint8 codes.
        b: uint8 codes; one of both may broadcast to the shape of the other, b to that of a if they are equally many.
        zeros: zero_a and zero_b, the code of the value 0 of each operand.
        ratio: the product of both scales over the scale of the result.
        fixed: what is added in steps of the result, float32, 0-d: its zero point minus ``to.zero``.
        to: zero, ends and ties of the result.

    Returns:
        uint8, in the shape that both broadcast to.

    Source: QLinearMul of ONNX Runtime; `tritonq.functional.integer_joins.integer_multiply`.
    """
    whole, other = _counted_from(a, zeros[0]), _counted_from(b, zeros[1])
    if whole.numel() < other.numel():
        whole, other = other, whole
    return codes_of_steps(whole.mul_(other).mul_(ratio).add_(fixed), to)


def look_up_codes(codes: Tensor, table: Tensor) -> Tensor:
    """Return ``table[code]`` for each code.

    Args:
        codes: uint8, dense (without gaps in memory, such as contiguous or channels_last).
        table: uint8, one axis: the new code at the index of each old one, and so longer than the largest of ``codes``.

    Returns:
        uint8, in the shape and memory order of ``codes``.
    """
    # One axis in the order of memory: torch looks up along one axis five times as fast.
    return table.index_select(0, in_memory_order(codes).int()).as_strided(codes.shape, codes.stride())


@cache
def has_one_pass_rounding(bounded: bool) -> bool:
    """Whether ``torch.quantize_per_tensor`` with scale 1 gives ``clip(round(step) + zero, 0, 255)``, ties to even.

    It then makes uint8 codes of float32 in one pass. False if torch has no such kernel here. Tried once on ties without
    a zero point and on whole numbers with one, in lengths that fill vectors and that don't.

    Args:
        bounded: whether steps lie within ±:data:`LARGEST_STEP`; if not, values beyond int32 are tried too, of which
            torch 2.11 and 2.14 make 0.
    """
    halves = torch.arange(-300, 600, dtype=torch.float32).div_(2)
    far, farther = (LARGEST_STEP / 2, LARGEST_STEP) if bounded else (1e10, math.inf)
    halves[1:600:150] = torch.tensor([far, farther, -far, -farther])
    cases = [(halves.round() if zero else halves, zero) for zero in (0, 3, 128)]
    cases += [(steps[:773], zero) for steps, zero in cases]
    with warnings.catch_warnings():
        # torch 2.13 says, once, that it means to drop its quantized tensors; `codes_of_steps` does without them then.
        warnings.simplefilter("ignore", UserWarning)
        try:
            return all(
                torch.equal(_round_in_one_pass(steps, zero), (steps.round() + zero).clamp_(0, 255).to(torch.uint8))
                for steps, zero in cases
            )
        except (AttributeError, RuntimeError):  # a torch without it, or without its x86 kernels
            return False


def _round_in_one_pass(steps: Tensor, zero: int) -> Tensor:
    quantized = torch.quantize_per_tensor(steps, 1.0, zero, torch.quint8)
    # Its bytes as an ordinary tensor: int_repr would copy them.
    codes = torch.empty(0, dtype=torch.uint8)
    return codes.set_(quantized.untyped_storage(), 0, quantized.shape, quantized.stride())


def _counted_from(codes: Tensor, start: int) -> Tensor:
    values = codes.to(torch.float32)
    return values.sub_(start) if start else values
