"""Functions of one tensor (SiLU, tanh, ...): by a table of codes in eval mode, as one operator in training.

In formulas ``fl`` is the rounding of a product to float32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.backend import without_kernel
from tritonq.functional.coded_tensor import memory_format_of
from tritonq.functional.codes import carried_codes, give_codes, rounded_codes
from tritonq.functional.differentiable_once import differentiable_once
from tritonq.functional.dispatch import implementation
from tritonq.functional.host_grid import HostGrid, host_grid
from tritonq.functional.integer_joins import divided
from tritonq.functional.saved_input import mark_on_grid, save_input
from tritonq.grid import Grid, RangeStatistics
from tritonq.reference.functions import Function, look_up, onto_output


def integer_function(x: Tensor, function: Function, source: Grid, output: Grid) -> Tensor:
    """Return f of quantized values as integer runtimes compute it: on the output's grid, before clipping.

    ``round(f(fl((code - z) · s_in)) / s_out) · s_out`` with f in float32, in the order of operations in which ONNX
    Runtime computes it; the type of ``output`` says how ties are rounded. For a ``source`` of up to 16 bits a table
    holds the result of every code, and values beyond its ends count as its ends. NaN stays NaN.

    Args:
        x: float tensor of values ``(code - zero_point) * s_in``.
        function: f and its numbers, such as ``Function("hardswish")`` or ``Function("leaky_relu", (0.1,))``.
        source: the input's grid, per tensor.
        output: grid of the quantizer behind the function, per tensor.

    Returns:
        float32, without gradient.

    Examples:
        >>> from tritonq.quantized_type import QuantizedType
        >>> codes = QuantizedType.of(8)
        >>> grids = [Grid(torch.tensor([scale]), None, codes) for scale in (0.5, 0.25)]
        >>> integer_function(torch.tensor([-4.0, 0.5, 3.0]), Function("hardswish"), *grids)
        tensor([-0.0000, 0.2500, 3.0000])
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return look_up(x, function, source, output)


def integer_prelu(x: Tensor, weight: Tensor, source: Grid, output: Grid) -> Tensor:
    """Return ``v = max(0, x) + weight · min(0, x)`` on the output's grid of scale s: ``round(v / s) · s``, not clipped.

    All is float32, in ONNX Runtime's order of operations. The type of ``output`` says how ties are rounded.

    Args:
        x: float tensor of values ``(code - zero_point) * scale`` of ``source``; rounded to these in float32 first.
        weight: float, (1,) or (x.shape[1],).
        source: the input's grid, per tensor.
        output: grid of the quantizer behind the operation, per tensor.

    Returns:
        float32, without gradient.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return onto_output(F.prelu(_exact_values(x, source), weight.float()), output)


def requantized(x: Tensor, source: Grid, output: Grid) -> Tensor:
    """Return values of one grid on another, ``round(x / s_out) · s_out``, before clipping; float32, without gradient.

    Ties are rounded as the type of ``output`` says.

    Args:
        x: float tensor of values ``(code - zero_point) * scale`` of ``source``. A value that differs from these, as
            float16 and bfloat16 do, is first replaced by the nearest one in float32.
        source: the input's grid, per tensor.
        output: the result's grid, per tensor.
    """
    with torch.no_grad():
        return onto_output(_exact_values(x, source), output)


def _exact_values(x: Tensor, source: Grid) -> Tensor:
    """Return ``round(x / s) · s`` in float32: the exact values of a grid, which ``x`` may hold in fewer bits."""
    return (x.float() / source.scale).round_().mul_(source.scale)


def function_codes(codes: Tensor, function: Function, source: HostGrid, output: HostGrid) -> Tensor:
    """Return ``clip(round(f(fl((code - z_in) · s_in)) / s_out) + z_out)`` for each code, from a cached table.

    f is computed in float32, in the order of operations in which ONNX Runtime computes it.

    Args:
        codes: uint8 codes of the input on the CPU, counted from 0 (the smallest code of the grid).
        function: f and its numbers.
        source: the input's grid: s_in and z_in are its ``scale`` and ``zero``.
        output: the result's grid, for s_out and z_out; its ``half_even`` says how ties are rounded.

    Returns:
        uint8, counted from 0, in the shape and order of ``codes``.
    """
    return _looked_up(codes, _table(function, source, output))


def concatenated_codes(tensors: tuple[Tensor, ...], dim: int, output: Grid) -> Tensor | None:
    """Concatenate tensors that carry codes, on the output's grid: codes on other grids become ``clip(round(x/s) + z)``.

    Args:
        tensors: float32 tensors on the CPU, each accepted by `codes.can_use_codes`; at least one.
        dim: the axis of the concatenation.
        output: grid of the quantizer behind it; gives scale s, zero point z and how ties are rounded.

    Returns:
        A float32 tensor of values on ``output`` that carries its codes, as `codes.give_codes` returns it (without codes
        in ``torch.inference_mode`` outside of a converted model); None if a tensor carries none, or ``output`` has an
        axis or over 256 codes, or is not on the CPU.
    """
    target, parts = host_grid(output), []
    if target is None:
        return None
    for x in tensors:
        carried = carried_codes(x)
        if carried is None:
            return None
        codes, source = carried
        parts.append(codes if source == target else _looked_up(codes, _requantized(source, target)))
    return give_codes(torch.cat(parts, dim), target, tensors[0])


def _looked_up(codes: Tensor, table: Tensor) -> Tensor:
    dense = codes.contiguous(memory_format=memory_format_of(codes))
    result: Tensor = without_kernel("eval_codes", codes).look_up_codes(dense, table)
    return result


def _values(grid: HostGrid) -> Tensor:
    """Return the float32 value of each code of a grid, in the order of codes."""
    return torch.arange(grid.largest + 1).sub_(grid.zero) * torch.tensor(grid.scale)


@lru_cache(maxsize=1024)
def _requantized(source: HostGrid, output: HostGrid) -> Tensor:
    """Return a table: for each code on ``source``, of value v, the code ``clip(round(v / s) + z)`` on ``output``."""
    return rounded_codes(divided(_values(source), output.to_grid()) / torch.tensor(output.scale), output)


@lru_cache(maxsize=1024)
def _table(function: Function, source: HostGrid, output: HostGrid) -> Tensor:
    """Return a table: for each code of the input on ``source``, the code of the function's result on ``output``."""
    result = integer_function(_values(source), function, source.to_grid(), output.to_grid())
    return rounded_codes(result / torch.tensor(output.scale), output)


def quantized_function(
    x: Tensor, function: Function, source: Grid | None, grid: Grid, statistics: RangeStatistics | None
) -> Tensor:
    """Return ``FQ(f(x))`` as one operator, where FQ is fake quantization to ``grid``; differentiable.

    The quantizer observes f(x): range and grid are updated in place before values are rounded. Both f and FQ compute in
    float32 (float64 for float64), and the result is rounded once to ``x``'s dtype. The gradient is ``f'(x) · dy`` where
    the code of f(x) is not clipped, else 0; the backward computes f(x) again instead of keeping it. If f is a chain of
    several functions (``function.steps``), the last is this operator, and the others are ordinary torch functions.

    Args:
        x: any shape and strides; float32, float16, bfloat16 or float64.
        function: f and its numbers.
        source: the grid that ``x`` was rounded to, so that its codes of one byte can be kept for the backward. With
            None, or a grid of more than 8 bits, ``x`` itself is kept. Ignored if f has several steps.
        grid: of the result, per tensor.
        statistics: the running range of ``grid``, which f(x) updates; None observes nothing.

    Returns:
        Tensor of ``x``'s shape and dtype; f(x) while ``grid`` is switched off or ``statistics`` have no data.
    """
    *earlier, last = function.steps
    for step in earlier:
        x, source = step(x), None
    result: Tensor = _QuantizedFunction.apply(x, last, source, grid, statistics)  # type: ignore[no-untyped-call]
    return result


class _QuantizedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Function, source: Grid | None, grid: Grid, statistics: RangeStatistics | None
    ) -> Tensor:
        y, frozen = implementation("functions", x).forward(x, function, grid, statistics)
        mark_on_grid(y, grid.scale, grid, statistics)
        if ctx.needs_input_grad[0]:
            ctx.qtype, ctx.function = grid.qtype, function
            ctx.save_for_backward(*save_input(x, source).tensors, frozen.scale, frozen.zero_point, frozen.enabled)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, input_scale, shift, scale, zero_point, enabled = ctx.saved_tensors
        frozen = Grid(scale, zero_point, ctx.qtype, enabled)
        dx = implementation("functions", dy).backward(dy, x, input_scale, shift, ctx.function, frozen)
        return dx, None, None, None, None
