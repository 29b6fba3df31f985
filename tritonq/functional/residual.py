"""Residual joins as a differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.functional.dispatch import implementation
from tritonq.functional.saved_input import mark
from tritonq.grid import Grid, RangeStatistics


def residual_join(
    a: Tensor, b: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None
) -> Tensor:
    """``FQ(relu?(a + b))`` as one operator that saves one bit per element.

    Both gradients are that of the result where neither ReLU nor the clip blocks it. The quantizer observes the sum.

    Args:
        a: any shape and strides; float32, float16, bfloat16 or float64.
        b: of ``a``'s shape, dtype and device.
        grid: per tensor; None leaves the result in float.
        statistics: the range behind the grid, which the sum updates; None observes nothing.
        ceiling: of the ReLU; see :func:`tritonq.reference.activation.rectify`.

    Returns:
        Tensor of that shape and dtype. The sum and what follows are float32 (float64 for float64), rounded once.
    """
    result: Tensor = _ResidualJoin.apply(a, b, grid, statistics, ceiling)  # type: ignore[no-untyped-call]
    return result


class _ResidualJoin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        grid: Grid | None,
        statistics: RangeStatistics | None,
        ceiling: float | None,
    ) -> Tensor:
        ctx.ops = implementation("residual", a)
        y, mask = ctx.ops.forward(a, b, grid, statistics, ceiling)
        if grid is not None:
            mark(y, grid.scale, grid, statistics)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(mask)
            ctx.strides = y.stride()
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        if dy.stride() != ctx.strides:
            dy = torch.empty_strided(dy.shape, ctx.strides, dtype=dy.dtype, device=dy.device).copy_(dy)
        g = ctx.ops.backward(dy, mask)
        return (g if ctx.needs_input_grad[0] else None), (g if ctx.needs_input_grad[1] else None), None, None, None
