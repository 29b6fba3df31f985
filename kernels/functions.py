"""Functions of one tensor and the quantizer behind them: two reads and one write forward, and as much backward.

The backward computes the function again from its input, which is read as one-byte codes if it lies on a grid. Functions
here have the names, signatures and results of `tritonq.reference.functions`, their specification. Exponentials are the
hardware's, so results agree with the specification except for the last bits, and codes except for ties.
`tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import gradient_bounds, gradient_passes, load_quantizer
from .cached_launch import Launcher
from .launch_sizes import Parameters, device_guard, flat_parameters, warp_size
from .layout import is_wide
from .pointwise import function_derivative, function_value, load_operand
from .quantized import Function, Grid, RangeStatistics, grid_constants, grid_pointers
from .rounded import laid_out_as, operation_constants, write_rounded

# 16 elements to a lane: both reads take whole lines. By bytes in flight, not measured.
_BACKWARD = Parameters(elements=2048, max_cols=2048, warps=4)


@Launcher
@triton.jit
def function_backward_kernel(
    dy_ptr,  # (n,)
    x_ptr,  # (n,), int8 codes with x_scale_ptr
    x_scale_ptr,  # one float32; None: x_ptr holds values
    x_shift_ptr,  # one number; the input is (x - shift) · scale. None stands for zero
    dx_ptr,  # (n,), written
    scale_ptr,  # one element: scale of the result's quantizer
    zero_point_ptr,  # one element: its zero point; None stands for zero
    active_ptr,  # one element: its switch; 0 blocks only infinite f(x) and NaN. None counts as 1
    n,
    OPERATION: tl.constexpr,  # name of the function
    NUMBER: tl.constexpr,  # its first number, or None
    OTHER_NUMBER: tl.constexpr,  # its second number, or None
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a program
    WIDE: tl.constexpr,
):
    """Write ``f'(x) · dy`` for BLOCK elements, 0 where the code of ``f(x)`` was clipped."""
    program = tl.program_id(0)
    offsets = (program.to(tl.int64) if WIDE else program) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0).to(tl.float32)
    x = load_operand(x_ptr, offsets, mask, 0, x_scale_ptr, x_shift_ptr)
    # As the forward read it: rounded to the dtype of the tensor.
    x = x.to(dy_ptr.dtype.element_ty).to(tl.float32)
    y = function_value(x, OPERATION, NUMBER, OTHER_NUMBER)
    scale, zero_point, active = load_quantizer(scale_ptr, zero_point_ptr, active_ptr)
    unit, low, high = gradient_bounds(scale, zero_point, active, None, True, QUANT_MIN, QUANT_MAX, ROUNDING)
    passes = gradient_passes(y, unit, low, high, None, True, ROUNDING)
    dx = tl.where(passes, dy, 0.0) * function_derivative(x, OPERATION, NUMBER, OTHER_NUMBER)
    tl.store(dx_ptr + offsets, dx, mask=mask)


def forward(x: Tensor, function: Function, grid: Grid, statistics: RangeStatistics | None) -> tuple[Tensor, Grid]:
    """Return ``FQ(f(x))`` as a dense tensor of the shape and dtype of ``x``, and the grid as this call used it.

    Args:
        x: any shape and strides; float32, float16 or bfloat16.
        function: f and its numbers; no chain such as ``"plus > clip"``.
        grid: of the result, per tensor; scale and zero point are updated in place from the range.
        statistics: the running range behind the grid, which f(x) updates first; None observes nothing, the grid stays.

    Returns:
        The result, which is f(x) while the grid is switched off or its range has no data; and a copy of the grid as
        this step used it, for :func:`backward`.
    """
    y = torch.empty_like(x)
    operands = (laid_out_as(y, x), None)
    frozen = write_rounded(operands, y, None, function.name, function.arguments, grid, statistics, None)
    return y, grid if frozen is None else frozen


def backward(
    dy: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, function: Function, grid: Grid
) -> Tensor:
    """Return the gradient of the function's input, ``f'(x) · dy`` where the result was not clipped, else 0.

    It has the dtype of ``dy`` and the strides of ``torch.empty_like(x)``.

    Args:
        dy: gradient of the result.
        x: the input, or its int8 codes if ``scale`` is given.
        scale: one float32: the input is ``(x - shift) · scale``, rounded to the dtype of ``dy``; None: ``x`` holds
            values.
        shift: one number, in units of codes; None for zero.
        function: f and its numbers, as in the forward.
        grid: the copy that :func:`forward` returned.
    """
    dx = torch.empty_like(x, dtype=dy.dtype)
    n = dx.numel()
    if n == 0:
        return dx
    chosen = flat_parameters("function_backward", dy, _BACKWARD)
    with device_guard(dy):
        function_backward_kernel[(triton.cdiv(n, chosen.elements),)](
            laid_out_as(dx, dy),
            laid_out_as(dx, x),
            scale,
            shift,
            dx,
            *grid_pointers(grid),
            n,
            **operation_constants(function.name, function.arguments),
            **grid_constants(grid),
            BLOCK=chosen.elements,
            WIDE=is_wide(n),
            num_warps=chosen.num_warps(warp_size(dy.device)),
            enable_fp_fusion=False,
        )
    return dx
