"""Fake quantization in PyTorch: the specification of `tritonq.kernels.fake_quant` and the CPU path.

Every step is an in-place pass over one temporary: on a CPU such a chain of vectorised operators is an order of
magnitude faster than torch's own scalar fake-quantize operator, and rounds identically.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype, round_half_away
from tritonq.grid import Grid
from tritonq.qparams import is_readable
from tritonq.quantized_type import QuantizedType, Rounding
from tritonq.reference.float_rounding import round_to_float_
from tritonq.reference.open_bounds import between, open_bounds, open_bounds_of_codes
from tritonq.reference.operator import Like, operator

# Ranges of more codes than this reach integers that float32 cannot hold, where the order of additions matters.
WIDE_CODES = 2**22


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that operators on tensors of ``dtype`` compute in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@operator(returns=Like("x"), visible=True, made_again=True)
def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Return ``(clamp(round(x/s) + z, quant_min, quant_max) - z) * s``, rounded to ``x.dtype`` at the end only.

    ``x/s`` is ``x * (1/s)`` for half_even and a true division for half_away. NaN stays NaN, infinities saturate. Float
    codes: the nearest number of the format to ``x/s``, ties to even, times ``s``. While the grid is switched off, the
    result is a copy of ``x``.

    Args:
        x: any shape; float16, bfloat16 and float32 compute in float32, float64 in float64.
        grid: of one scale, or one per index of axis ``grid.qtype.axis`` of ``x``.

    Source: torch.fake_quantize_per_tensor_affine; MegEngine quantization.utils.
    """
    enabled = grid.enabled_flag()
    if enabled is False:
        return x.clone()
    qtype = grid.qtype
    scale, offset = _broadcast(x, grid)
    steps = _steps(x, scale, qtype)
    if qtype.float_format is not None:
        steps.clamp_(-qtype.reach, qtype.reach)
    elif isinstance(offset, Tensor) or qtype.quant_max - qtype.quant_min >= WIDE_CODES:
        steps.add_(offset).clamp_(qtype.quant_min, qtype.quant_max).sub_(offset)
    else:
        steps.clamp_(qtype.quant_min - offset, qtype.quant_max - offset)
    y = steps.mul_(scale).to(x.dtype)
    return y if enabled is True else torch.where(enabled, y, x)


@operator(returns=(Like("x"), Like("x", torch.bool)), visible=True, made_again=True)
def fake_quantize_with_mask(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return ``(clamp(round(x/s) + z, quant_min, quant_max) - z) * s``, and a mask of where the gradient passes.

    With the mask, a backward need not keep ``x``.

    Args:
        x: any shape; float16, bfloat16, float32 or float64 (which computes in float64).
        grid: of one scale, or one per index of axis ``grid.qtype.axis`` of ``x``.

    Returns:
        ``(y, mask)``, shaped as ``x``: y in ``x.dtype``, and bool: whether the rounded, unclipped code lies in
        the range; False at NaN. While the grid is switched off, a copy of ``x``, and True everywhere.

    Source: torch's ``fake_quantize_per_tensor_affine_cachemask``.
    """
    enabled = grid.enabled_flag()
    if enabled is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    scale, offset = _broadcast(x, grid)
    codes = _steps(x, scale, grid.qtype)
    if isinstance(offset, Tensor) or offset:
        codes.add_(offset)
    bounded = codes.clamp(*_bounds(grid.qtype))
    # A value is inside where its clamp leaves it as it is; NaN differs from itself.
    mask = bounded == codes
    if isinstance(offset, Tensor) or offset:
        bounded.sub_(offset)
    y = bounded.mul_(scale).to(x.dtype)
    return (y, mask) if enabled is True else (torch.where(enabled, y, x), mask | ~enabled)


@operator(returns=Like("x"), visible=True)
def fake_quantize_backward(dy: Tensor, x: Tensor, grid: Grid, blocks_ends: bool = False) -> Tensor:
    """Return ``dy`` where the rounded, unclipped code lies in the range of the grid, else 0; 0 at NaN.

    The mask is recomputed from ``x``. While the grid is switched off the gradient is ``dy``.

    Args:
        dy: gradient of the result, in the shape and dtype of ``x``; not changed.
        x: the input of :func:`fake_quantize`.
        grid: the grid that :func:`fake_quantize` rounded to, unchanged.
        blocks_ends: whether the first and the last code block the gradient, too, as in fixed point.

    Returns:
        Tensor of ``x``'s shape and dtype; ``dy`` itself while the grid is known to be off.
    """
    enabled = grid.enabled_flag()
    if enabled is False:
        return dy
    scale, offset = _broadcast(x, grid)
    low, high = grid.qtype.quant_min + blocks_ends, grid.qtype.quant_max - blocks_ends
    number = grid.qtype.float_format
    # Strict bounds; a NaN would compare as inside, so that it is made infinite first.
    if number is not None:
        values = _steps(x, scale, grid.qtype).nan_to_num_(torch.inf)
        bound = number.largest if blocks_ends else number.overflow
        bounds, out = (-bound, bound), values
    elif grid.qtype.axis is None and not isinstance(offset, Tensor) and is_readable(scale):
        values, zero = x.to(scale.dtype), int(offset)
        if not math.isfinite(values.sum()):
            values = values.nan_to_num(torch.inf, torch.inf, -torch.inf)
        bounds = open_bounds(float(scale), low - zero, high - zero, grid.qtype.rounding, scale.dtype)
        out = torch.empty_like(values)
    else:
        values = _steps(x, scale, grid.qtype)
        if isinstance(offset, Tensor) or offset:
            values.add_(offset)
        values.nan_to_num_(torch.inf, torch.inf, -torch.inf)
        bounds, out = open_bounds_of_codes(low, high, scale.dtype), values
    dx = between(dy.to(values.dtype), values, *bounds, out=out).to(x.dtype)
    return dx if enabled is True else torch.where(enabled, dx, dy)


@operator(returns=Like("x", arithmetic_dtype))
def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Return ``clamp(round(x/s) + z, quant_min, quant_max)`` as integer-valued floats, whether the grid is on or off.

    For a float format the result is its numbers, ``x / s`` rounded to the nearest and clipped to the largest.

    Args:
        x: any shape; float16, bfloat16, float32 or float64 (which computes in float64).
        grid: of one scale, or one per index of axis ``grid.qtype.axis`` of ``x``.

    Returns:
        float32 tensor of ``x``'s shape; float64 for a float64 ``x``.
    """
    scale, offset = _broadcast(x, grid)
    return _steps(x, scale, grid.qtype).add_(offset).clamp_(*_bounds(grid.qtype))


def reciprocal(scale: Tensor) -> Tensor:
    """Return ``1 / scale`` rounded to float32, in the dtype of ``scale``: torch rounds it so for float64 ``x``, too."""
    return as_dtype(as_dtype(scale, torch.float32).reciprocal(), scale.dtype)


def steps_(x: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
    """Return ``round(x / scale)``; overwrites ``x``, which is float32 or float64.

    ``scale`` broadcasts against ``x``, in its dtype. ``rounding`` ``"half_even"`` multiplies by the float32 reciprocal
    and returns ``x`` itself; ``"half_away"`` divides, ties away from zero, and returns a new tensor.
    """
    return x.mul_(reciprocal(scale)).round_() if rounding == "half_even" else round_half_away(x.div_(scale))


def _broadcast(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor | float]:
    """Return scale and zero point, shaped to broadcast against ``x``, in the dtype of the arithmetic.

    A zero point that is the same everywhere, and readable without waiting, is returned as a number: bounds that are
    numbers clamp at full speed, and an integer tensor in float arithmetic does not.
    """
    align, zero_point = grid.granularity.align, grid.zero_point
    dtype = arithmetic_dtype(x.dtype)
    scale = align(grid.scale.to(dtype), x.dim())
    if zero_point is None:
        return scale, 0.0
    if is_readable(zero_point):
        if zero_point.numel() == 1:
            return scale, float(zero_point)
        if not bool(zero_point.any()):
            return scale, 0.0
    return scale, align(zero_point.to(dtype), x.dim())


def _steps(x: Tensor, scale: Tensor, qtype: QuantizedType) -> Tensor:
    """Return ``round(x/s)`` in a new tensor, in the dtype of the arithmetic.

    Values too large for a float format become the format's ``overflow``.
    """
    x = x.to(scale.dtype)
    if qtype.rounding == "half_away":
        return round_half_away(x.div(scale))
    steps, number = x.mul(reciprocal(scale)), qtype.float_format
    return steps.round_() if number is None else round_to_float_(steps, number, number.overflow)


def _bounds(qtype: QuantizedType) -> tuple[float, float]:
    """Return the smallest and the largest code; for a float format its smallest and largest number."""
    return (qtype.quant_min, qtype.quant_max) if qtype.float_format is None else (-qtype.reach, qtype.reach)
