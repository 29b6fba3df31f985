"""Gradients of learned scales in PyTorch: the specification of `tritonq.kernels.learned_scale` and the CPU path."""

from __future__ import annotations

from collections.abc import Callable
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
        zero_point: int32, shaped as ``parameter``; None stands for zero, as it must with ``"tqt"`` and ``"pact"``.
        quant_min: smallest code.
        quant_max: largest code.
        axis: axis of ``x`` that ``parameter`` runs along, or None.
        method: see above.
        active: uint8, one element; 0 returns ``x`` as it is. None counts as 1.

    Source: SEMANTICS section 1.
    """
    scale, shift, values = _broadcast(x, parameter, zero_point, axis)
    if method == "megengine" and shift is not None:
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
        ``parameter``. The last one is 0 where ``zero_point`` is None.
    """
    scale, shift, values = _broadcast(x, parameter, zero_point, axis)
    inside, terms = _terms(values, scale, shift, quant_min, quant_max, method)
    g = dy.to(values.dtype)
    on = None if active is None else active.view(()) != 0
    dx = inside.mul_(g).to(x.dtype)
    dx = dx if on is None else torch.where(on, dx, dy)
    sums = []
    for term in terms:
        total = g.new_zeros(()) if term is None else _sum_to(term.mul_(g), scale)
        total = total.expand(parameter.numel()).view(parameter.shape)
        sums.append(total.clone() if on is None else torch.where(on, total, 0))
    return dx, sums[0], sums[1]


def _terms(
    values: Tensor, scale: Tensor, shift: Tensor | None, quant_min: int, quant_max: int, method: LearnedScale
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """Where the gradient passes, and what each value adds to the parameter's and the zero point's per unit of dy.

    Masks are 0.0 and 1.0, and 0.0 at NaN: on CPUs `where` takes as long as ten products. A value is inside where its
    clamp leaves it as it is.
    """
    if method == "pact":
        above = _mask(torch.ge, values, scale)
        return _mask(torch.ge, values, torch.zeros_like(scale)).sub_(above), (above, None)
    v = values * scale.reciprocal() if method == "torch" else values / scale
    position = v.round() if method == "torch" else v
    if shift is not None:
        position.add_(shift)
    reach = 0.5 if method == "tqt" else 0.0
    bounded = position.clamp(quant_min - reach, quant_max + reach)
    outside = None
    if shift is not None and method == "torch":
        # Not the complement of the mask inside, which NaN would belong to.
        outside = _mask(torch.ne, bounded, position).sub_(_mask(torch.ne, position, position)).mul_(-scale)
    inside = _mask(torch.eq, bounded, position)
    if method == "torch":
        code = bounded if shift is None else bounded.sub_(shift)
    else:
        code = round_half_away(bounded).clamp_(quant_min, quant_max)
    return inside, (_less_inside(code, v, inside), outside)


def _less_inside(code: Tensor, v: Tensor, inside: Tensor) -> Tensor:
    """``code - v`` inside, ``code`` outside, 0 at NaN, in place of ``code`` and ``v``."""
    # Infinity times 0 is NaN.
    return code.nan_to_num_(0.0).sub_(v.mul_(inside).nan_to_num_(0.0))


def _mask(compare: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The result of a comparison as 0.0 and 1.0 in ``a``'s dtype."""
    return compare(a, b, out=torch.empty_like(a))


def _broadcast(
    x: Tensor, parameter: Tensor, zero_point: Tensor | None, axis: int | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Parameter and zero point shaped to broadcast against ``x``, and ``x``, all in the dtype of the arithmetic."""
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    parameter = parameter.to(dtype).view(shape)
    shift = None if zero_point is None else zero_point.to(dtype).view(shape)
    return parameter, shift, x.to(dtype)


def _sum_to(terms: Tensor, like: Tensor) -> Tensor:
    """Sums of ``terms`` over the dimensions that ``like`` has one element in: 0-d, or (channels,)."""
    return terms.sum_to_size(like.shape).view(-1) if like.numel() > 1 else terms.sum()
