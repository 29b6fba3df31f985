"""Sums and products that are rounded, as differentiable functions that save one bit per element.

The bit says whether the gradient passes: neither ReLU nor the clip of the quantizer blocks it. FQ in formulas is fake
quantization to ``grid``, ``relu?`` a ReLU if ``ceiling`` is not None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype
from tritonq.functional.differentiable_once import differentiable_once
from tritonq.functional.dispatch import implementation
from tritonq.functional.integer_joins import joint_dtype
from tritonq.functional.saved_input import SavedInput, load_input, mark_on_grid, save_input
from tritonq.grid import Grid, RangeStatistics


def residual_join(
    a: Tensor, b: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None
) -> Tensor:
    """Return ``FQ(relu?(a + b))`` as one operator that saves one bit per element.

    First ``relu?(a + b)`` updates range and grid, in place, then it is rounded to the new grid. The gradient of ``a``
    and of ``b`` is that of the result, 0 where ReLU or clip block it.

    Args:
        a: any shape and strides; float32, float16, bfloat16 or float64.
        b: of ``a``'s shape, dtype and device.
        grid: per tensor; None: nothing is observed, and the result stays in float.
        statistics: the running range of ``grid``; None: range and grid stay as they are.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.

    Returns:
        Tensor of ``a``'s shape and dtype. The sum and what follows are float32 (float64 for float64), rounded once.
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
        y, mask = _sum(a, b, grid, statistics, ceiling)
        if grid is not None:
            mark_on_grid(y, grid.scale, grid, statistics)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(mask)
            ctx.strides = y.stride()
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        g = _passed(dy, ctx.saved_tensors[0], ctx.strides)
        return (g if ctx.needs_input_grad[0] else None), (g if ctx.needs_input_grad[1] else None), None, None, None


def _sum(
    a: Tensor, b: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None
) -> tuple[Tensor, Tensor]:
    """Return ``FQ(relu?(a + b))`` in ``a``'s dtype, and the mask of where the gradient passes: one bit per element.

    While ``torch.compile`` traces, the mask is one bool per element. ``statistics`` is the range that is observed
    (None: none is); ``ceiling`` bounds the ReLU (None: there is none).
    """
    if not torch.compiler.is_compiling():
        join: tuple[Tensor, Tensor] = implementation("residual", a).forward(a, b, grid, statistics, ceiling)
        return join
    wide = torch.promote_types(a.dtype, torch.float32)
    y, mask = _rounded(as_dtype(a, wide) + as_dtype(b, wide), grid, statistics, ceiling)
    return as_dtype(y, a.dtype), mask


def _rounded(
    y: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None
) -> tuple[Tensor, Tensor]:
    """Return ``FQ(relu?(y))`` and the mask of where the gradient passes: one bit per element.

    While ``torch.compile`` traces, the mask is one bool per element. If there is a grid, ``relu?(y)`` first updates
    ``statistics`` and the grid. ``y``, float32 or float64, may be overwritten.
    """
    operators = implementation("rounded", y)
    run = operators.forward_with_mask if torch.compiler.is_compiling() else operators.forward
    join: tuple[Tensor, Tensor] = run(y, grid, statistics, ceiling)
    return join


def rounded_result(y: Tensor, grid: Grid, statistics: RangeStatistics | None, ceiling: float | None) -> Tensor:
    """Return ``FQ(relu?(y))`` as one operator that saves one bit per element; differentiable.

    First ``relu?(y)`` updates range and grid, in place, then it is rounded to the new grid. The gradient is that of the
    result, 0 where ReLU or clip block it.

    Args:
        y: any shape and strides; float32, float16, bfloat16 or float64; not changed.
        grid: per tensor.
        statistics: the running range of ``grid``; None: range and grid stay as they are.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.

    Returns:
        New tensor of ``y``'s shape and dtype; computed in float32 (float64 for float64), rounded once.
    """
    result: Tensor = _Rounded.apply(y, grid, statistics, ceiling)  # type: ignore[no-untyped-call]
    return result


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, grid: Grid, statistics: RangeStatistics | None, ceiling: float | None) -> Tensor:
        wide = y.to(torch.promote_types(y.dtype, torch.float32), copy=True)
        result, mask = _rounded(wide, grid, statistics, ceiling)
        result = as_dtype(result, y.dtype)
        mark_on_grid(result, grid.scale, grid, statistics)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(mask)
            ctx.strides = result.stride()
        return result

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _passed(dy, ctx.saved_tensors[0], ctx.strides), None, None, None


def rounded_product(
    a: Tensor,
    b: Tensor,
    grid_a: Grid | None,
    grid_b: Grid | None,
    grid: Grid,
    statistics: RangeStatistics | None,
    ceiling: float | None,
) -> Tensor:
    """Return ``FQ(relu?(a * b))``, where FQ rounds to ``grid``; differentiable.

    First ``relu?(a * b)`` updates range and grid, in place, then it is rounded to the new grid. The gradients are those
    of a product, from ``dy`` where neither ReLU nor clip block it, else 0. For the backward it saves one bit per
    element of the result, and ``a`` if ``b`` needs a gradient, and ``b`` if ``a`` does: as one-byte codes where
    :func:`save_input` can (one scale, integer codes of up to 8 bits).

    Args:
        a: any shape and strides; float32, float16, bfloat16 or float64.
        b: broadcasts against ``a``; any of these dtypes; on ``a``'s device.
        grid_a: grid of the quantizer that rounded ``a``; None: unknown.
        grid_b: grid of the quantizer that rounded ``b``; None: unknown.
        grid: of the result, per tensor.
        statistics: the running range of ``grid``; None: range and grid stay as they are.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.

    Returns:
        Tensor in the shape and dtype of torch's product; computed in float32 (float64 for float64), rounded once.
    """
    result: Tensor = _RoundedProduct.apply(a, b, grid_a, grid_b, grid, statistics, ceiling)  # type: ignore
    return result


class _RoundedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        grid_a: Grid | None,
        grid_b: Grid | None,
        grid: Grid,
        statistics: RangeStatistics | None,
        ceiling: float | None,
    ) -> Tensor:
        dtype = joint_dtype(a, b)
        wide = torch.promote_types(dtype, torch.float32)
        product = as_dtype(a, wide) * as_dtype(b, wide)
        result, mask = _rounded(product, grid, statistics, ceiling)
        result = as_dtype(result, dtype)
        mark_on_grid(result, grid.scale, grid, statistics)
        of_a, of_b = ctx.needs_input_grad[:2]
        saved_a = save_input(a, grid_a) if of_b else None
        saved_b = save_input(b, grid_b) if of_a else None
        if of_a or of_b:
            ctx.save_for_backward(mask, *_tensors(saved_a), *_tensors(saved_b))
            ctx.strides, ctx.shapes, ctx.dtypes = result.stride(), (a.shape, b.shape), (a.dtype, b.dtype)
        return result

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        mask, *saved = ctx.saved_tensors
        g = _passed(dy, mask, ctx.strides)
        needs_a, needs_b = ctx.needs_input_grad[:2]
        (shape_a, shape_b), (dtype_a, dtype_b) = ctx.shapes, ctx.dtypes
        (a, scale_a, shift_a), (b, scale_b, shift_b) = saved[:_SAVED], saved[_SAVED:]
        da = db = None
        if needs_a:
            da = (g * load_input(SavedInput(b, scale_b, shift_b, dtype_b))).sum_to_size(shape_a).to(dtype_a)
        if needs_b:
            db = (g * load_input(SavedInput(a, scale_a, shift_a, dtype_a))).sum_to_size(shape_b).to(dtype_b)
        return da, db, None, None, None, None, None


# A saved factor is this many tensors.
_SAVED = 3


def _tensors(saved: SavedInput | None) -> tuple[Tensor | None, ...]:
    return (None,) * _SAVED if saved is None else saved.tensors


def _passed(dy: Tensor, mask: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return ``dy`` where the mask is set, else 0; ``strides`` are those of the forward's result."""
    if mask.dtype == torch.bool:
        return torch.where(mask, dy, 0)
    if dy.stride() != strides:
        dy = torch.empty_strided(dy.shape, strides, dtype=dy.dtype, device=dy.device).copy_(dy)
    result: Tensor = implementation("residual", dy).backward(dy, mask)
    return result
