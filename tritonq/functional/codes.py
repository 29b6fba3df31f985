"""How quantized tensors travel between the modules of a model in eval mode: as codes, beside or instead of values.

A module that computes on codes calls two functions:

- :func:`take_codes` gives the codes of its input: those the input carries, or new ones made from its values.
- :func:`give_codes` makes the module's result from codes: a float tensor that carries them.

Codes are uint8 and count from 0: ``code - quant_min``. Values are ``(code - zero_point) * scale`` as ever. Both
functions answer None where codes can't be used (see :func:`can_use_codes`): the module then computes on float values.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tritonq.backend import select
from tritonq.grid import Grid
from tritonq.qparams import round_half_away

_MAX_CODES = 256
_MARK = "_tritonq_codes"


class HostGrid(NamedTuple):
    """A grid of one scale and up to 256 codes, as numbers on the host.

    Attributes:
        scale: the float32 scale.
        zero: the code of the value 0, counted from the smallest code on: ``zero_point - quant_min``.
        largest: the largest code, counted likewise: ``quant_max - quant_min``.
        half_even: whether ties go to the even code; else away from zero.
    """

    scale: float
    zero: int
    largest: int
    half_even: bool


def host_grid(grid: Grid) -> HostGrid | None:
    """Read a grid on the host; None for one with several scales or more than 256 codes, or off the CPU."""
    qtype = grid.qtype
    if qtype.axis is not None or qtype.quant_max - qtype.quant_min >= _MAX_CODES or not grid.scale.is_cpu:
        return None
    zero = 0 if grid.zero_point is None else int(grid.zero_point)
    return HostGrid(
        float(grid.scale), zero - qtype.quant_min, qtype.quant_max - qtype.quant_min, qtype.rounding == "half_even"
    )


def can_use_codes(x: Tensor) -> bool:
    """Whether ``x`` may be computed on as codes.

    That is so for float32 tensors on the CPU that need no gradient, while nothing traces, transforms or watches the
    operators: no ``torch.compile``, ``torch.jit.trace``, ``torch.func`` and no dispatch mode.
    """
    return (
        type(x) is Tensor
        and x.dtype is torch.float32
        and x.is_cpu
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and select(x) == "torch"
    )


def take_codes(x: Tensor, grid: HostGrid) -> Tensor | None:
    """Return the codes of ``x`` on ``grid``, uint8; None where a value lies beyond the grid's ends or is NaN.

    Args:
        x: a tensor that :func:`can_use_codes` accepts. Values between two codes go to the nearer one.
        grid: where its values lie.
    """
    carried = getattr(x, _MARK, None)
    if carried is not None and carried[0] == grid and carried[1] == x._version:
        codes: Tensor = carried[2]
        return codes
    return _encode(x, grid)


def give_codes(codes: Tensor, grid: HostGrid, like: Tensor) -> Tensor:
    """Return the float tensor that the codes stand for; it carries them for the next :func:`take_codes`.

    Args:
        codes: uint8, up to ``grid.largest``; not changed any more.
        grid: their grid.
        like: the module's input. The result is channels_last where that is, else contiguous; the codes may differ.
    """
    values = codes.to(torch.float32, memory_format=memory_format_of(like))
    if grid.zero:
        values.sub_(grid.zero)
    values.mul_(grid.scale)
    if not values.is_inference():
        setattr(values, _MARK, (grid, values._version, codes))
    return values


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the format that results of operators on ``x`` have: channels_last where ``x`` is, else contiguous."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def rounded_codes(steps: Tensor, grid: HostGrid, low: int = 0, high: int | None = None) -> Tensor:
    """Return the codes of values in steps of the grid's scale, clipped to ``[low, high]``; overwrites ``steps``.

    Args:
        steps: float32 ``value / scale``, finite.
        grid: the grid.
        low: smallest code of the result, counted from 0.
        high: largest one; None: the grid's.
    """
    high = grid.largest if high is None else min(high, grid.largest)
    if grid.half_even and has_one_pass_rounding():
        codes = _round_in_one_pass(steps, grid.zero)
        # That has clipped to 0 and 255.
        if low > 0:
            codes.clamp_(min=low)
        return codes if high >= _MAX_CODES - 1 else codes.clamp_(max=high)
    rounded = steps.round_() if grid.half_even else round_half_away(steps)
    return rounded.add_(grid.zero).clamp_(low, high).to(torch.uint8)


@cache
def has_one_pass_rounding() -> bool:
    """Whether torch rounds float32 to uint8 in one pass, ties to even before the zero point is added.

    Tried once on ties, with and without a zero point, in lengths that fill vectors and that don't.
    """
    ties = torch.arange(-300, 600, dtype=torch.float32).div_(2)
    cases = [(ties[:length], zero) for length in (900, 773, 5) for zero in (0, 3, 128)]
    with warnings.catch_warnings():
        # torch 2.13 says, once, that it means to drop its quantized tensors; `rounded_codes` does without them then.
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


def _encode(x: Tensor, grid: HostGrid) -> Tensor | None:
    steps = (x / grid.scale).round_().add_(grid.zero)
    if not steps.numel():
        return steps.to(torch.uint8)
    least, most = torch.aminmax(steps)
    # False for NaN as well.
    return steps.to(torch.uint8) if float(least) >= 0 and float(most) <= grid.largest else None
