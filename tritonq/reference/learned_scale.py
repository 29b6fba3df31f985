"""Learned scales in PyTorch: the specification of `tritonq.kernels.learned_scale` and the CPU path.

The *parameter* is what training learns: the scale, or the clipping level for method ``"pact"``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor

from tritonq.arithmetic import round_half_away
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType
from tritonq.reference.fake_quant import arithmetic_dtype, fake_quantize
from tritonq.reference.operator import Like, operator

# Which published gradient: torch's learnable operators (LSQ, LSQ+), MegEngine's LSQ, TQT, PACT.
LearnedScale = Literal["torch", "megengine", "tqt", "pact"]


@operator(returns=Like("x"), visible=True)
def learned_fake_quantize(x: Tensor, grid: Grid, method: LearnedScale) -> Tensor:
    """Return ``(code - z) · s`` in float32, rounded once to ``x.dtype``; the code depends on ``method``.

    - ``"torch"``: ``clip(round(x/s) + z)``, with ``round(x/s)`` as the grid's type rounds.
    - ``"megengine"``: ``round_half_away(clip(x/s + z))``.
    - ``"tqt"``: ``clip(round_half_away(x/s))``.
    - ``"pact"``: ``clip(round_half_even(x * (1/s)))`` with ``s = parameter / quant_max``.

    While the grid is switched off, the result is a copy of ``x``.

    Args:
        x: any shape; float16, bfloat16, float32 or float64 (which computes in float64).
        grid: its scale is the learned parameter; with ``"pact"`` the clipping level. It has no zero point with
            ``"tqt"`` and ``"pact"``. Its type says how ties are rounded, except for ``"megengine"`` with a zero point:
            the caller gives a type that rounds as the formula does.
        method: which of the formulas above.

    Source: torch._fake_quantize_learnable_per_tensor_affine; MegEngine's LSQ; Jain et al. (2020); Choi et al. (2018).
    """
    if method == "megengine" and grid.zero_point is not None:
        scale, shift, values = _broadcast(x, grid)
        code = values.div(scale).add_(cast(Tensor, shift)).clamp_(grid.qtype.quant_min, grid.qtype.quant_max)
        y = round_half_away(code).sub_(cast(Tensor, shift)).mul_(scale).to(x.dtype)
        return y if grid.enabled is None else torch.where(grid.enabled_on_device(), y, x)
    if method == "pact":
        grid = grid.with_scale(grid.scale / grid.qtype.quant_max)
    return fake_quantize(x, grid)


@operator(
    returns=(Like("x"), Like("grid.scale", arithmetic_dtype), Like("grid.scale", arithmetic_dtype)),
    visible=True,
)
def learned_fake_quantize_backward(
    dy: Tensor, x: Tensor, grid: Grid, method: LearnedScale
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`learned_fake_quantize`: of ``x``, of the parameter, and of the zero point.

    With ``v = x/s``, and sums over the values that share a scale; ``ds`` is the parameter's gradient:

    - ``"torch"``: inside where the rounded, unclipped code is a code;
      ``ds = Σ dy {quant_min - z below | quant_max - z above | code - z - v inside}``, ``dz = Σ dy {-s outside}``.
    - ``"megengine"``: inside where ``v + z`` is in range;
      ``ds = Σ dy {quant_min below | quant_max above | round(v + z) - (v + z) inside}``, ``dz = 0``.
    - ``"tqt"``: inside where v is in ``[quant_min - 0.5, quant_max + 0.5]``;
      ``ds = Σ dy {code - v inside | code outside}``. A caller that trains ``t`` with ``s = 2^t`` multiplies by
      ``s ln 2``.
    - ``"pact"``: inside where ``0 <= x < parameter``; ``dparameter = Σ dy {1 where x >= parameter}``.

    ``dx = dy`` inside, else 0. Where x is NaN, dx is 0 and the sums get nothing. While the grid is switched off,
    ``dx = dy`` and the others are 0.

    Args:
        dy: gradient of the result, shaped as ``x``.
        x: the input, any shape; float16, bfloat16, float32 or float64.
        grid: its scale is the parameter, as the forward used it: with ``"pact"`` the clipping level, else s.
        method: which of the formulas above.

    Returns:
        ``(dx, dparameter, dzero_point)``: ``x.dtype``; two in the arithmetic's dtype (float32, or float64), shaped as
        ``grid.scale``. The last one is 0 where the grid has no zero point.
    """
    scale, shift, values = _broadcast(x, grid)
    inside, terms = _terms(values, scale, shift, grid.qtype, method)
    g = dy.to(values.dtype)
    on = None if grid.enabled is None else grid.enabled_on_device()
    dx = inside.mul_(g).to(x.dtype)
    dx = dx if on is None else torch.where(on, dx, dy)
    sums = []
    for term in terms:
        total = g.new_zeros(()) if term is None else _sum_to(term.mul_(g), scale)
        total = total.expand(grid.scale.numel()).view(grid.scale.shape)
        sums.append(total.clone() if on is None else torch.where(on, total, 0))
    return dx, sums[0], sums[1]


def _terms(
    values: Tensor, scale: Tensor, shift: Tensor | None, qtype: QuantizedType, method: LearnedScale
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """Return a mask of where the gradient passes, and what each value adds to the parameters' gradients per unit of dy.

    The second has a tensor for the parameter and one for the zero point (None: its gradient is 0). Masks are 0.0 and
    1.0, and 0.0 at NaN: on CPUs `where` takes as long as ten products. A value is inside where its clamp leaves it as
    it is.

    Args:
        values: x in the dtype of the arithmetic.
        scale: the parameter, shaped to broadcast against x.
        shift: the zero point, likewise; None for 0.
        qtype: codes, and how the method ``"torch"`` rounds.
        method: which of the formulas of :func:`learned_fake_quantize_backward`.
    """
    if method == "pact":
        above = _mask(torch.ge, values, scale)
        return _mask(torch.ge, values, torch.zeros_like(scale)).sub_(above), (above, None)
    halves_to_even = method == "torch" and qtype.rounding == "half_even"
    v = values * scale.reciprocal() if halves_to_even else values / scale
    position = v
    if method == "torch":
        position = v.round() if halves_to_even else round_half_away(v)
    if shift is not None:
        position.add_(shift)
    reach = 0.5 if method == "tqt" else 0.0
    bounded = position.clamp(qtype.quant_min - reach, qtype.quant_max + reach)
    outside = None
    if shift is not None and method == "torch":
        # Not the complement of the mask inside, which NaN would belong to.
        outside = _mask(torch.ne, bounded, position).sub_(_mask(torch.ne, position, position)).mul_(-scale)
    inside = _mask(torch.eq, bounded, position)
    if method == "torch":
        code = bounded if shift is None else bounded.sub_(shift)
    else:
        code = round_half_away(bounded).clamp_(qtype.quant_min, qtype.quant_max)
    return inside, (_less_inside(code, v, inside), outside)


def _less_inside(code: Tensor, v: Tensor, inside: Tensor) -> Tensor:
    """Return ``code - v`` inside the range, ``code`` outside, 0 at NaN; overwrites ``code`` and ``v``."""
    # Infinity times 0 is NaN.
    return code.nan_to_num_(0.0).sub_(v.mul_(inside).nan_to_num_(0.0))


def _mask(compare: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Return ``compare(a, b)`` as 0.0 and 1.0 in ``a``'s dtype."""
    return compare(a, b, out=torch.empty_like(a))


def _broadcast(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the scale and zero point (or None) of ``grid``, shaped to broadcast against ``x``, and ``x``.

    All three have the dtype that is computed in, :func:`tritonq.reference.fake_quant.arithmetic_dtype`.
    """
    align, dtype = grid.granularity.align, arithmetic_dtype(x.dtype)
    shift = None if grid.zero_point is None else align(grid.zero_point.to(dtype), x.dim())
    return align(grid.scale.to(dtype), x.dim()), shift, x.to(dtype)


def _sum_to(terms: Tensor, like: Tensor) -> Tensor:
    """Return the sums of ``terms`` per scale: 0-d if ``like`` has one element, else (channels,)."""
    return terms.sum_to_size(like.shape).view(-1) if like.numel() > 1 else terms.sum()
