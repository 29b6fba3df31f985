"""Linear maps whose backward keeps the input as one byte per value, and rounds the weight again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype
from tritonq.functional.differentiable_once import differentiable_once
from tritonq.functional.dispatch import implementation
from tritonq.functional.linear_map import DifferentiableMap, LinearMap, as_autocast
from tritonq.functional.saved_input import SavedInput, load_input, save_input
from tritonq.grid import Grid
from tritonq.reference.scratch import borrow


def rounded_map(
    x: Tensor, weight: Tensor, bias: Tensor | None, op: LinearMap, input_grid: Grid | None, weight_grid: Grid | None
) -> Tensor:
    """Return ``op(x, FQ(weight)) + bias``, where FQ rounds to ``weight_grid``; differentiable.

    The weight's gradient is 0 where its code was clipped. For the backward the operator saves the weight unrounded and,
    if the weight needs a gradient, ``x``: as codes where :func:`save_input` can (one scale, integer codes of up to 8
    bits).

    Args:
        x: (batch, in, ...), for a matrix product (..., in), or without a batch; cast to autocast's dtype where that is
            on, unless float64.
        weight: float, shaped as the layer's parameter, such as (out, in/groups, kh, kw) or (out, in).
        bias: (out,) or None.
        op: the convolution or matrix product, without weight and bias.
        input_grid: grid of the quantizer that rounded ``x``; None: unknown.
        weight_grid: grid of the weight's rows (out channels on axis 0), with one scale or one per row; nothing is
            observed. None: the weight is not rounded.

    Returns:
        (batch, out, ...), for a matrix product (..., out), without a batch if ``x`` has none; in the dtype that ``op``
        gives.
    """
    x, plain = op.padded(as_autocast(x))
    if x.dim() == -plain.output_axis:
        return rounded_map(x.unsqueeze(0), weight, bias, plain, input_grid, weight_grid).squeeze(0)
    if not torch.is_grad_enabled():
        # Autograd's functions are not told, and would make codes for no backward.
        return plain(x, _rounded(weight, plain, weight_grid), bias)
    y: Tensor = _RoundedMap.apply(x, weight, bias, plain, input_grid, weight_grid)  # type: ignore[no-untyped-call]
    return y


class _RoundedMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        op: DifferentiableMap,
        input_grid: Grid | None,
        weight_grid: Grid | None,
    ) -> Tensor:
        # A running observer overwrites its qparams in place before the backward reads them.
        grid = None if weight_grid is None else weight_grid.copy()
        y = op(x, _rounded(weight, op, grid), bias)
        ctx.op, ctx.qtype = op, None if grid is None else grid.qtype
        ctx.x_shape, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        kept = save_input(x, input_grid).tensors if ctx.needs_input_grad[1] else (None, None, None)
        buffers = () if grid is None else (grid.scale, grid.zero_point, grid.enabled)
        ctx.save_for_backward(*kept, weight, *buffers)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, shift, weight, *buffers = ctx.saved_tensors
        grid = Grid(buffers[0], buffers[1], ctx.qtype, buffers[2]) if buffers else None
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        op: DifferentiableMap = ctx.op
        # Of what isn't needed the shape alone matters.
        x = dy.new_empty(()).expand(ctx.x_shape)
        if needs_weight:
            x = load_input(SavedInput(values, scale, shift, ctx.x_dtype), borrow("input", values, torch.float32))
        used = _rounded(weight, op, grid) if needs_x else weight
        dx, dw, dbias = op.backward(dy, x, used.to(dy.dtype), needs_x, needs_weight, needs_bias)
        if dw is not None:
            dw = as_dtype(dw, weight.dtype)
            if grid is not None:
                rows = implementation("fake_quant", weight).fake_quantize_backward(
                    op.to_rows(dw), op.to_rows(weight), grid
                )
                dw = op.from_rows(rows)
        dbias = None if dbias is None else as_dtype(dbias, ctx.bias_dtype)
        return dx, dw, dbias, None, None, None


def _rounded(weight: Tensor, op: LinearMap, grid: Grid | None) -> Tensor:
    if grid is None:
        return weight
    rows: Tensor = implementation("fake_quant", weight).fake_quantize(op.to_rows(weight), grid)
    return op.from_rows(rows)
