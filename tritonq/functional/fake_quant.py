"""Fake quantization as differentiable functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.backend import Backend
from tritonq.functional.differentiable_once import differentiable_once
from tritonq.functional.dispatch import implementation
from tritonq.functional.groups import as_rows, group_rows, in_groups
from tritonq.functional.validate import (
    check_axis,
    check_float_tensor,
    check_scale,
    check_zero_point,
)
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType, Rounding


def fake_quantize_per_tensor_affine(
    x: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    quant_min: int,
    quant_max: int,
    *,
    rounding: Rounding = "half_even",
    backend: Backend = "auto",
) -> Tensor:
    """Round ``x`` to the grid of one scale and zero point; gradients pass straight through inside the range.

    ``y = (clamp(round(x/s) + z, quant_min, quant_max) - z) * s``; ``dx = dy`` where the rounded, unclipped code lies in
    the range, else 0. Equals ``torch.fake_quantize_per_tensor_affine`` bit for bit on finite float32 input with
    ``|x/s| < 2^31``; NaN stays NaN with zero gradient, infinities saturate.

    Args:
        x: any shape and strides; float32, float16, bfloat16 or float64.
        scale: a number, or a one-element float tensor on ``x``'s device. Values of CUDA tensors are not checked, since
            that would synchronise with the host.
        zero_point: an int, or a one-element integer tensor on ``x``'s device; checked likewise.
        quant_min: smallest code.
        quant_max: largest code.
        rounding: ``"half_even"`` (torch) or ``"half_away"`` (MegEngine).
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.

    Returns:
        Tensor of ``x``'s shape, dtype and memory format. The arithmetic is float32 (float64 for float64 input).

    Raises:
        TypeError: ``x``, scale, zero point or ends of the codes of another type or dtype than told above.
        ValueError: ``quant_min`` not below ``quant_max``, over 2^32 codes, a zero point that is no code, a scale not
            positive and finite, either on another device or not of one element, an unknown rounding or backend.
        RuntimeError: a backend asked for, here or by ``use_backend``, that can't run on ``x``.

    Source: docs/numbers.md, "Fake quantization".

    Examples:
        >>> fake_quantize_per_tensor_affine(torch.tensor([-1.0, 0.26, 9.0]), 0.5, 0, -8, 7)
        tensor([-1.0000,  0.5000,  3.5000])
    """
    return fake_quantize(x, _checked_grid(x, scale, zero_point, None, quant_min, quant_max, rounding), backend)


def fake_quantize_per_channel_affine(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    *,
    group_size: int | None = None,
    rounding: Rounding = "half_even",
    backend: Backend = "auto",
) -> Tensor:
    """Round ``x`` to one grid per index of ``axis``; gradients pass straight through inside the range.

    ``y = (clamp(round(x/s) + z, quant_min, quant_max) - z) * s`` with s and z of the index, or of the group;
    ``dx = dy`` where the rounded, unclipped code lies in the range; ``dx`` is 0 elsewhere, and at NaN.

    Args:
        x: any shape and strides; float32, float16, bfloat16 or float64.
        scale: float tensor (x.shape[axis],); with groups shaped as ``x``, but with one index per group along ``axis``.
        zero_point: integer tensor, as ``scale``.
        axis: the channel axis; may be negative.
        quant_min: smallest code.
        quant_max: largest code.
        group_size: number of neighbouring elements along ``axis`` that share a grid, at each index of the other axes
            (ONNX's ``block_size``); None: all elements at an index of ``axis`` share one. If ``axis`` is not the
            innermost in memory, ``x`` is copied first.
        rounding: ``"half_even"`` (torch) or ``"half_away"`` (MegEngine).
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.

    Returns:
        Tensor of ``x``'s shape and dtype. The arithmetic is float32 (float64 for float64 input).

    Raises:
        TypeError: an argument of another type or dtype than told above.
        ValueError: ``quant_min`` not below ``quant_max``, over 2^32 codes, a zero point that is no code, a scale not
            positive and finite (neither is checked on GPUs), either of another shape or on another device, an axis out
            of range, groups that don't divide it, an unknown rounding or backend.
        RuntimeError: a backend asked for, here or by ``use_backend``, that can't run on ``x``.

    Source: docs/numbers.md, "Fake quantization".

    Examples:
        >>> x, zero = torch.ones(2, 2), torch.zeros(2, dtype=torch.int32)
        >>> fake_quantize_per_channel_affine(x, torch.tensor([0.3, 0.4]), zero, 0, -8, 7)
        tensor([[0.9000, 0.9000],
                [0.8000, 0.8000]])
    """
    if group_size is not None:
        check_float_tensor("x", x)

        def per_row(rows: Tensor, row_scale: Tensor, row_zero: int | Tensor) -> Tensor:
            return fake_quantize(
                rows, _checked_grid(rows, row_scale, row_zero, 0, quant_min, quant_max, rounding), backend
            )

        return in_groups(per_row, x, scale, zero_point, axis, group_size)
    return fake_quantize(x, _checked_grid(x, scale, zero_point, axis, quant_min, quant_max, rounding), backend)


def fake_quantize(x: Tensor, grid: Grid, backend: Backend = "auto", blocks_ends: bool = False) -> Tensor:
    """Round ``x`` to a grid: what both public functions and the modules call; differentiable.

    ``y = (clamp(round(x/s) + z, quant_min, quant_max) - z) * s``; of float codes, the nearest number of the format to
    ``x/s``, times s. The scale gets no gradient. Only the dtype of ``x`` is checked: scales must be positive and
    finite, and as many as the grid's type asks for.

    Args:
        x: any shape and strides; float32, float16, bfloat16 or float64.
        grid: any granularity. Its switch is read on ``x``'s device: while it is 0, values and gradients pass unchanged.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.
        blocks_ends: whether the first and the last code block the gradient, too.

    Returns:
        Tensor of ``x``'s shape and dtype, never ``x`` itself. ``dx = dy`` where the rounded code is not clipped, else
        0, also at NaN.

    Raises:
        TypeError: ``x`` is no float tensor.
        ValueError: the grid's groups don't divide their axis of ``x``, or an unknown backend.
        RuntimeError: a backend asked for, here or by ``use_backend``, that can't run on ``x``.
    """
    check_float_tensor("x", x)
    if grid.scale.requires_grad:
        grid = grid.with_scale(grid.scale.detach())
    rows = group_rows(x, grid.granularity)
    if rows is not None:
        return rows.join(fake_quantize(*as_rows(x, grid), backend, blocks_ends))
    if not (x.requires_grad and torch.is_grad_enabled()):
        # Going through autograd costs as much as a small tensor's whole arithmetic.
        y: Tensor = implementation("fake_quant", x, backend).fake_quantize(x, grid)
        return y
    result: Tensor = _FakeQuantize.apply(x, grid, backend, blocks_ends)  # type: ignore[no-untyped-call]
    return result


def _checked_grid(
    x: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    rounding: Rounding,
) -> Grid:
    """Return the grid that a public function's arguments of these names describe; None for ``axis``: one scale.

    Raises:
        TypeError: ``x``, scale or zero point of the wrong kind.
        ValueError: empty code range, zero point outside it, scale not positive and finite, qparams of another shape or
            device, or an axis out of range.
    """
    check_float_tensor("x", x)
    qtype = QuantizedType(quant_min, quant_max, False, None if axis is None else check_axis(x, axis), rounding)
    channels = None if qtype.axis is None else x.shape[qtype.axis]
    scale = check_scale(scale, x, channels)
    return Grid(scale, check_zero_point(zero_point, x, channels, quant_min, quant_max), qtype)


class _FakeQuantize(torch.autograd.Function):
    """The autograd function. It saves ``x`` and the grid; the backward computes its mask again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, backend: Backend, blocks_ends: bool) -> Tensor:
        ctx.ops, ctx.qtype, ctx.blocks_ends = implementation("fake_quant", x, backend), grid.qtype, blocks_ends
        if ctx.needs_input_grad[0]:
            # A running observer overwrites its qparams in place, and a switch may be thrown between forward and
            # backward: the backward keeps this step's own copies.
            kept = grid.copy()
            ctx.save_for_backward(x, kept.scale, kept.zero_point, kept.enabled)
            grid = kept
        y: Tensor = ctx.ops.fake_quantize(x, grid)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, enabled = ctx.saved_tensors
        grid = Grid(scale, zero_point, ctx.qtype, enabled)
        return ctx.ops.fake_quantize_backward(dy, x, grid, ctx.blocks_ends), None, None, None
