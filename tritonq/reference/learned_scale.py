"""Gradients of learned scales in PyTorch: the specification of `tritonq.kernels.learned_scale` and the CPU path."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tritonq.qparams import round_half_away
from tritonq.reference.fake_quant import fake_quantize

# Which published gradient: torch's learnable operators (LSQ, LSQ+), MegEngine's LSQ, TQT, PACT.
LearnedScale = Literal["torch", "megengine", "tqt", "pact"]


def learned_fake_quantize(
    x: Tensor,
    parameter: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    method: LearnedScale,
    *,
    active: Tensor | None = None,
) -> Tensor:
    """``(code - z) * s`` in float32, rounded once to ``x.dtype``; the code depends on ``method``.

    - ``"torch"``: ``clip(round_half_even(x * (1/s)) + z)``.
    - ``"megengine"``: ``round_half_away(clip(x/s + z))``.
    - ``"tqt"``: ``clip(round_half_away(x/s))``.
    - ``"pact"``: ``clip(round_half_even(x * (1/s)))`` with ``s = parameter / quant_max``.

    Args:
        x: any shape; float16, bfloat16, float32 or float64 (which computes in float64).
        parameter: one element, or (x.shape[axis],): the scale; with ``"pact"`` the clipping level.
        zero_point: int32, shaped as ``parameter``; None stands for zero.
        quant_min: smallest code.
        quant_max: largest code.
        axis: axis of ``x`` that ``parameter`` runs along, or None.
        method: see above.
        active: uint8, one element; 0 returns ``x`` as it is. None counts as 1.

    Source: SEMANTICS section 1.
    """
    if method == "megengine" and zero_point is not None:
        scale, shift, values = _broadcast(x, parameter, zero_point, axis)
        code = round_half_away(values.div(scale).add_(shift).clamp_(quant_min, quant_max))
        y = code.sub_(shift).mul_(scale).to(x.dtype)
        return y if active is None else torch.where(active.view(()) != 0, y, x)
    scale = parameter / quant_max if method == "pact" else parameter
    rounding: Literal["half_even", "half_away"] = "half_even" if method in ("torch", "pact") else "half_away"
    return fake_quantize(x, scale, zero_point, quant_min, quant_max, axis, rounding, active=active)


def learned_fake_quantize_backward(
    dy: Tensor,
    x: Tensor,
    parameter: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    method: LearnedScale,
    *,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`learned_fake_quantize`; shapes and dtypes as there.

    With ``v = x/s``, and sums over everything but ``axis``:

    - ``"torch"``: inside where the rounded, unclipped code is a code;
      ``ds = Σ dy {quant_min - z below | quant_max - z above | code - z - v inside}``, ``dz = Σ dy {-s outside}``.
    - ``"megengine"``: inside where ``v + z`` is in range;
      ``ds = Σ dy {quant_min below | quant_max above | round(v + z) - (v + z) inside}``, ``dz = 0``.
    - ``"tqt"``: inside where v is in ``[quant_min - 0.5, quant_max + 0.5]``;
      ``ds = Σ dy {code - v inside | code outside}``; the threshold's gradient is ``ds s ln 2``.
    - ``"pact"``: inside where ``0 <= x < parameter``; ``dparameter = Σ dy {1 where x >= parameter}``.

    ``dx = dy`` inside, else 0. Where x is NaN every gradient is 0. Where ``active`` is 0, ``dx = dy``, the others 0.

    Returns:
        ``(dx, dparameter, dzero_point)``: ``x.dtype``; two in the arithmetic's dtype (float32, or float64), shaped as
        ``parameter``.
    """
    scale, shift, values = _broadcast(x, parameter, zero_point, axis)
    inside, per_parameter, per_zero_point = _terms(values, scale, shift, quant_min, quant_max, method)
    g = dy.to(values.dtype)
    on = None if active is None else active.view(()) != 0
    dx = torch.where(inside if on is None else inside | ~on, g, 0).to(x.dtype)
    sums = []
    for term in (per_parameter, per_zero_point):
        total = g.new_zeros(()) if term is None else _sum_to(torch.where(values.isnan(), 0, term * g), scale)
        total = total.expand(parameter.numel()).view(parameter.shape)
        sums.append(total.clone() if on is None else torch.where(on, total, 0))
    return dx, sums[0], sums[1]


def _terms(
    values: Tensor, scale: Tensor, shift: Tensor, quant_min: int, quant_max: int, method: LearnedScale
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where the gradient passes, and what each value adds to the parameter's and the zero point's per unit of dy."""
    if method == "pact":
        return (values >= 0) & (values < scale), (values >= scale).to(values.dtype), None
    if method == "torch":
        v = values * scale.reciprocal()
        code = v.round() + shift
        inside = (code >= quant_min) & (code <= quant_max)
        steps = code.clamp(quant_min, quant_max) - shift
        return inside, torch.where(inside, steps - v, steps), torch.where(inside, 0, -scale)
    v = values / scale
    if method == "megengine":
        v = v + shift
        inside = (v >= quant_min) & (v <= quant_max)
        return inside, torch.where(inside, round_half_away(v) - v, v.clamp(quant_min, quant_max)), None
    inside = (v >= quant_min - 0.5) & (v <= quant_max + 0.5)
    code = round_half_away(v).clamp_(quant_min, quant_max)
    return inside, torch.where(inside, code - v, code), None


def _broadcast(
    x: Tensor, parameter: Tensor, zero_point: Tensor | None, axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter and zero point shaped to broadcast against ``x``, and ``x``, all in the dtype of the arithmetic."""
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    parameter = parameter.to(dtype).view(shape)
    shift = torch.zeros_like(parameter) if zero_point is None else zero_point.to(dtype).view(shape)
    return parameter, shift, x.to(dtype)


def _sum_to(terms: Tensor, like: Tensor) -> Tensor:
    """Sums of ``terms`` over the dimensions that ``like`` has one element in: 0-d, or (channels,)."""
    return terms.sum_to_size(like.shape).view(-1) if like.numel() > 1 else terms.sum()
