"""Fake quantization in PyTorch: the specification of `tritonq.kernels.fake_quant` and the CPU path.

Every step is an in-place pass over one temporary: on a CPU such a chain of vectorised operators is an order of
magnitude faster than torch's own scalar fake-quantize operator, and rounds identically.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.qparams import Rounding, is_readable, round_half_away
from tritonq.reference.open_bounds import open_bounds, open_bounds_of_codes

# Ranges of more codes than this reach integers that float32 cannot hold, where the order of additions matters.
_WIDE_CODES = 2**22


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    rounding: Rounding = "half_even",
    *,
    active: Tensor | None = None,
) -> Tensor:
    """``(clamp(round(x/s) + z, quant_min, quant_max) - z) * s``, computed in float32 and rounded once to ``x.dtype``.

    ``x/s`` is ``x * (1/s)`` for half_even and a true division for half_away. NaN stays NaN, infinities saturate.

    Args:
        x: any shape; float16, bfloat16, float32 or float64 (which computes in float64).
        scale: float32; one element, or (x.shape[axis],) with ``axis``.
        zero_point: int32, shaped as ``scale``; None stands for zero everywhere.
        quant_min: smallest code.
        quant_max: largest code.
        axis: axis of ``x`` that ``scale`` runs along, or None.
        rounding: see :class:`tritonq.qparams.QuantizedType`.
        active: uint8, one element; 0 returns ``x`` as it is. None counts as 1.

    Source: SEMANTICS section 1.
    """
    if _known_off(active):
        return x.clone()
    scale, offset = _broadcast(x, scale, zero_point, axis)
    steps = _steps(x, scale, rounding)
    if isinstance(offset, Tensor) or quant_max - quant_min >= _WIDE_CODES:
        steps.add_(offset).clamp_(quant_min, quant_max).sub_(offset)
    else:
        steps.clamp_(quant_min - offset, quant_max - offset)
    return _switched(active, steps.mul_(scale).to(x.dtype), x)


def fake_quantize_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    rounding: Rounding = "half_even",
    *,
    active: Tensor | None = None,
) -> Tensor:
    """Straight-through gradient: ``dy`` where the rounded, unclipped code lies in the range, 0 elsewhere and at NaN.

    Shapes and dtypes as in :func:`fake_quantize`; the mask is recomputed from ``x``. Where ``active`` is 0
    it is ``dy``. Returns ``x.dtype``.
    """
    if _known_off(active):
        return dy
    scale, offset = _broadcast(x, scale, zero_point, axis)
    # Strict bounds; a NaN would compare as inside, so that it is made infinite first.
    if axis is None and not isinstance(offset, Tensor) and is_readable(scale):
        values = x.to(scale.dtype).nan_to_num(torch.inf, torch.inf, -torch.inf)
        zero = int(offset)
        bounds = open_bounds(float(scale), quant_min - zero, quant_max - zero, rounding, scale.dtype)
    else:
        values = _steps(x, scale, rounding)
        if isinstance(offset, Tensor) or offset:
            values.add_(offset)
        values.nan_to_num_(torch.inf, torch.inf, -torch.inf)
        bounds = open_bounds_of_codes(quant_min, quant_max, scale.dtype)
    dx = torch.ops.aten.hardtanh_backward.grad_input(dy.to(values.dtype), values, *bounds, grad_input=values)
    return _switched(active, dx.to(x.dtype), dy)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    rounding: Rounding = "half_even",
) -> Tensor:
    """The codes ``clamp(round(x/s) + z, quant_min, quant_max)`` as integer-valued floats; arguments as above."""
    scale, offset = _broadcast(x, scale, zero_point, axis)
    return _steps(x, scale, rounding).add_(offset).clamp_(quant_min, quant_max)


def steps_(x: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
    """``round(x / scale)``; overwrites ``x``, which has the dtype of the arithmetic."""
    return x.mul_(scale.reciprocal()).round_() if rounding == "half_even" else round_half_away(x.div_(scale))


def _known_off(active: Tensor | None) -> bool:
    """Whether ``active`` is a zero that can be read without synchronising with a device or breaking a graph."""
    return active is not None and is_readable(active) and not bool(active)


def _switched(active: Tensor | None, on: Tensor, off: Tensor) -> Tensor:
    """``on`` or ``off`` by a switch that :func:`_known_off` could not read on the host."""
    if active is None or is_readable(active):
        return on
    return torch.where(active.view(()) != 0, on, off)


def _broadcast(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None) -> tuple[Tensor, Tensor | float]:
    """Scale and zero point shaped to broadcast against ``x``, in the dtype of the arithmetic.

    A zero point that can be read and is the same everywhere comes as a number: bounds that are numbers clamp at full
    speed, and an integer tensor in float arithmetic does not.
    """
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = scale.to(dtype).view(shape)
    if zero_point is None:
        return scale, 0.0
    if is_readable(zero_point):
        if zero_point.numel() == 1:
            return scale, float(zero_point)
        if not bool(zero_point.any()):
            return scale, 0.0
    return scale, zero_point.to(dtype).view(shape)


def _steps(x: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
    """``round(x/s)`` in a new tensor of the arithmetic's dtype."""
    x = x.to(scale.dtype)
    return x.mul(scale.reciprocal()).round_() if rounding == "half_even" else round_half_away(x.div(scale))
