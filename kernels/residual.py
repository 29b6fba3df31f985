"""Residual joins: two reads of both inputs, one write, and one bit per element for the backward.

A *residual join* is ``FQ(relu?(a + b))``. The bit says whether the gradient passes; eight *planes* of the tensor have
one bit each of a byte (`tritonq.kernels.rounded`). Functions here have the names, signatures and results of
`tritonq.reference.residual`, their specification. `tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached_launch import Launcher
from .launch_sizes import Parameters, device_guard, flat_parameters, warp_size
from .layout import is_wide
from .quantized import Grid, RangeStatistics
from .rounded import PLANES, laid_out_as, mask_like, write_rounded

# Of each plane, 8 elements to a lane: 128-bit accesses to 16-bit elements.
_BACKWARD = Parameters(elements=PLANES * 1024, max_cols=1024, warps=4)


@Launcher
@triton.jit
def join_backward_kernel(
    dy_ptr,  # (n,)
    mask_ptr,  # (plane,) uint8: bit b of byte i belongs to element b · plane + i
    g_ptr,  # (n,), written
    n,
    plane,  # bytes of the mask
    ROWS: tl.constexpr,  # planes: bits of a byte
    COLS: tl.constexpr,  # bytes of the mask per program
    WIDE: tl.constexpr,
):
    """Write ``dy`` for elements whose bit of the mask is set, else 0."""
    program = tl.program_id(0)
    at = (program.to(tl.int64) if WIDE else program) * COLS + tl.arange(0, COLS)
    byte = tl.load(mask_ptr + at, mask=at < plane, other=0).to(tl.int32)
    for bit in tl.static_range(ROWS):
        offsets = bit * plane + at
        mask = (at < plane) & (offsets < n)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0)
        tl.store(g_ptr + offsets, tl.where(((byte >> bit) & 1) != 0, dy, 0.0), mask=mask)


def forward(
    a: Tensor, b: Tensor, grid: Grid | None, statistics: RangeStatistics | None, ceiling: float | None
) -> tuple[Tensor, Tensor]:
    """Return ``FQ(relu?(a + b))`` as a dense tensor of ``a``'s dtype, and a mask, one bit per element for the backward.

    The mask is uint8 (plane,): bit b of byte i belongs to element ``b · plane + i`` in the result's memory order, and
    is 1 where the gradient passes.

    Args:
        a: any shape.
        b: of ``a``'s shape and dtype.
        grid: of the quantizer, per tensor; None: the sum is neither observed nor rounded. While its switch is off or
            its range is empty, the sum is not rounded.
        statistics: the running range of the grid: ``relu?(a + b)`` updates it first, in place, and the grid follows.
            None: nothing is observed, and the grid stays as it is.
        ceiling: upper bound of the ReLU, infinity for a plain one, 6 for ReLU6; None: no ReLU.
    """
    y = torch.empty_like(a)
    mask = mask_like(y)
    write_rounded((laid_out_as(y, a), laid_out_as(y, b)), y, mask, "add", (), grid, statistics, ceiling)
    return y, mask


def backward(dy: Tensor, mask: Tensor) -> Tensor:
    """Return ``dy`` for elements whose bit of the mask is set, else 0: the gradient of both inputs.

    ``dy`` is dense, in the memory order of the forward's result, and is not changed; ``mask`` is the forward's.
    """
    g = torch.empty_like(dy)
    plane = mask.numel()
    if dy.numel() == 0:
        return g
    chosen = flat_parameters("residual_backward", dy, _BACKWARD)
    columns = max(1, chosen.elements // PLANES)
    with device_guard(dy):
        join_backward_kernel[(triton.cdiv(plane, columns),)](
            dy,
            mask,
            g,
            dy.numel(),
            plane,
            ROWS=PLANES,
            COLS=columns,
            WIDE=is_wide(dy.numel()),
            num_warps=chosen.num_warps(warp_size(dy.device)),
        )
    return g
