"""Results of any operation, observed and rounded: two reads of its operands, one write, and one bit per element.

The result is ``FQ(relu?(f(a, b)))`` for an operation f of `tritonq.kernels.pointwise`. Operands lie in the memory order
of the result. The mask of the gradient is bytes: the result is cut into eight *planes* of equal length, and bit b of
byte i belongs to element i of plane b. Functions that `tritonq.reference.rounded` has, too, are specified there.
`tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import gradient_bounds, gradient_passes, load_quantizer, merge_range, quantize_value
from .cached_launch import Launcher
from .constants import INF
from .launch_sizes import Parameters, device_guard, flat_parameters, programs_that_fill, warp_size
from .layout import is_wide
from .pointwise import operate
from .quantized import Grid, RangeStatistics, grid_constants, grid_pointers, observing_switch

# Planes start on 16 elements, so that every dtype is read 128 bits at a time.
_ALIGNMENT = 16
# Planes of a mask: one for each bit of a byte.
PLANES = 8
# Elements of each plane per program, 8 to a lane: 128-bit accesses to 16-bit elements.
_ROUNDED = Parameters(elements=PLANES * 1024, max_cols=1024, warps=4)
# Bytes of the operands that a program of the range loads at a time: 64 to a lane, as many as `TILES_AHEAD` are.
_RANGE_BYTES, _RANGE_WARPS = 8192, 4


@triton.jit
def scan_results(
    a_ptr,  # (n,)
    b_ptr,  # (n,), or None for an operation of one operand
    start,  # of the share, in elements, as is its end
    end,
    OPERATION: tl.constexpr,  # "add", "mul", "none", or a function of a; names: `tritonq.kernels.pointwise`
    NUMBER: tl.constexpr,  # of that function, as a slope; None: it has none
    OTHER_NUMBER: tl.constexpr,  # a second number of that function, or None
    BLOCK: tl.constexpr,  # elements read at a time
    FINITE_ONLY: tl.constexpr,  # whether results that are not finite are left out
):
    """Return minimum and maximum of f(a, b), before ReLU and rounding, over a share, and how many were left out.

    Each is (BLOCK,), one number per lane, which the caller merges: float32, float32, int32. The share must not be
    empty.

    With FINITE_ONLY NaN and infinities are left out; a lane without other values gets infinity as its minimum and
    -infinity as its maximum. Without it nothing is left out, and NaN propagates.
    """
    low = tl.full([BLOCK], INF, tl.float32)
    high = tl.full([BLOCK], -INF, tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    # Stands in for missing elements.
    first_a = tl.load(a_ptr + start)
    first_b = first_a if b_ptr is None else tl.load(b_ptr + start)
    lane = tl.arange(0, BLOCK)
    next_a = tl.load(a_ptr + start + lane, mask=start + lane < end, other=first_a)
    next_b = next_a if b_ptr is None else tl.load(b_ptr + start + lane, mask=start + lane < end, other=first_b)
    for at in range(start, end, BLOCK):
        a, b, mask = next_a.to(tl.float32), next_b.to(tl.float32), at + lane < end
        # The next block is loaded before this one is used, so that the compiler can't defer its loads.
        offsets = at + BLOCK + lane
        next_a = tl.load(a_ptr + offsets, mask=offsets < end, other=first_a)
        next_b = next_a if b_ptr is None else tl.load(b_ptr + offsets, mask=offsets < end, other=first_b)
        result = operate(a, b, OPERATION, NUMBER, OTHER_NUMBER)
        if FINITE_ONLY:
            finite = tl.abs(result) < INF
            low = tl.minimum(low, tl.where(finite, result, INF))
            high = tl.maximum(high, tl.where(finite, result, -INF))
            bad += (mask & (finite == 0)).to(tl.int32)
        else:
            low = tl.minimum(low, result, propagate_nan=tl.PropagateNan.ALL)
            high = tl.maximum(high, result, propagate_nan=tl.PropagateNan.ALL)
    return low, high, bad


@Launcher
@triton.jit
def rounded_range_kernel(
    a_ptr,  # (n,)
    b_ptr,  # (n,), or None
    low_ptr,  # (programs,) float32, written
    high_ptr,  # (programs,) float32, written
    nonfinite_ptr,  # one int64, grows by the number of values skipped
    observing_ptr,  # one uint8; 0: nothing is written
    n,
    share,  # elements per program: whole blocks
    OPERATION: tl.constexpr,  # "add", "mul", "none", or a function of a; names: `tritonq.kernels.pointwise`
    NUMBER: tl.constexpr,  # of that function, as a slope; None: it has none
    OTHER_NUMBER: tl.constexpr,  # a second number of that function, or None
    BLOCK: tl.constexpr,  # elements read at a time
    WIDE: tl.constexpr,  # whether offsets take 64 bits
):
    """Write the smallest and largest finite f(a, b) of one share, and count those that are not finite.

    For a share without a finite one it writes infinity as the smallest and -infinity as the largest.
    """
    if tl.load(observing_ptr) == 0:
        return
    program = tl.program_id(0)
    start = program.to(tl.int64) * share if WIDE else program * share
    end = tl.minimum(start + share, n)
    low, high, _ = scan_results(a_ptr, b_ptr, start, end, OPERATION, NUMBER, OTHER_NUMBER, BLOCK, False)
    skipped = 0
    if tl.max(((tl.abs(low) < INF) & (tl.abs(high) < INF) & (low == low)).to(tl.int32) ^ 1, 0) > 0:
        # Rare: a result is NaN or infinite. Read the share again and leave those out.
        low, high, bad = scan_results(a_ptr, b_ptr, start, end, OPERATION, NUMBER, OTHER_NUMBER, BLOCK, True)
        skipped = tl.sum(bad, 0)
    # A share without finite results merges as zero elements would: its empty range is not finite and is skipped.
    tl.store(low_ptr + program, tl.min(low, 0))
    tl.store(high_ptr + program, tl.max(high, 0))
    if skipped > 0:
        tl.atomic_add(nonfinite_ptr, skipped.to(tl.int64))  # type: ignore[attr-defined]


@Launcher
@triton.jit
def rounded_kernel(
    a_ptr,  # (n,)
    b_ptr,  # (n,), or None
    y_ptr,  # (n,), written
    mask_ptr,  # (plane,) uint8, written: bits that are 1 where the gradient passes; or None
    scale_ptr,  # one element; None without a quantizer
    zero_point_ptr,  # one element; None stands for zero
    active_ptr,  # 0 leaves the result unrounded; None counts as 1
    n,
    plane,  # elements of a plane, bytes of the mask
    OPERATION: tl.constexpr,  # "add", "mul", "none", or a function of a; names: `tritonq.kernels.pointwise`
    NUMBER: tl.constexpr,  # of that function, as a slope; None: it has none
    OTHER_NUMBER: tl.constexpr,
    CEILING: tl.constexpr,  # of the ReLU; infinity for a plain one, None without
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,  # planes: bits of a byte
    COLS: tl.constexpr,  # elements of each plane per program
    WIDE: tl.constexpr,  # whether offsets take 64 bits
):
    """Write ``FQ(relu?(f(a, b)))`` of COLS elements of each plane, and the COLS bytes of their mask."""
    program = tl.program_id(0)
    at = (program.to(tl.int64) if WIDE else program) * COLS + tl.arange(0, COLS)
    scale, zero_point, active = load_quantizer(scale_ptr, zero_point_ptr, active_ptr)
    QUANTIZED: tl.constexpr = scale_ptr is not None
    unit, low, high = gradient_bounds(scale, zero_point, active, CEILING, QUANTIZED, QUANT_MIN, QUANT_MAX, ROUNDING)
    byte = tl.zeros([COLS], tl.int32)
    for bit in tl.static_range(ROWS):
        offsets = bit * plane + at
        mask = (at < plane) & (offsets < n)
        a = tl.load(a_ptr + offsets, mask=mask, other=0).to(tl.float32)
        b = a if b_ptr is None else tl.load(b_ptr + offsets, mask=mask, other=0).to(tl.float32)
        result = operate(a, b, OPERATION, NUMBER, OTHER_NUMBER)
        y = quantize_value(result, scale, zero_point, active, CEILING, QUANTIZED, QUANT_MIN, QUANT_MAX, ROUNDING)
        tl.store(y_ptr + offsets, y, mask=mask)
        if mask_ptr is not None:
            passes = gradient_passes(result, unit, low, high, CEILING, QUANTIZED, ROUNDING)
            byte += (mask & passes).to(tl.int32) << bit
    if mask_ptr is not None:
        tl.store(mask_ptr + at, byte.to(tl.uint8), mask=at < plane)


def forward(y: Tensor, grid: Grid, statistics: RangeStatistics | None, ceiling: float | None) -> tuple[Tensor, Tensor]:
    """Write ``FQ(relu?(y))`` over ``y``; return ``y`` and the mask of where the gradient passes, one bit per element.

    Args:
        y: float32, dense; overwritten.
        grid: of the quantizer, per tensor, updated in place if there are ``statistics``. While its switch is off or the
            range is empty, ``relu?(y)`` is written.
        statistics: the running range of the grid, updated first by ``relu?(y)``; None: nothing is observed.
        ceiling: upper bound of the ReLU, infinity for a plain one, 6 for ReLU6; None: no ReLU.
    """
    mask = mask_like(y)
    write_rounded((y, None), y, mask, "none", (), grid, statistics, ceiling)
    return y, mask


def write_rounded(
    operands: tuple[Tensor, Tensor | None],
    y: Tensor,
    mask: Tensor | None,
    operation: str,
    arguments: tuple[float, ...],
    grid: Grid | None,
    statistics: RangeStatistics | None,
    ceiling: float | None,
) -> Grid | None:
    """Write ``FQ(relu?(f(a, b)))`` and the mask of its gradient; return a snapshot of the grid, or None without a grid.

    Args:
        operands: ``(a, b)``, of ``y``'s shape and strides; b is None for an operation of one operand.
        y: where the result is written, rounded once to its dtype; dense; may be an operand.
        mask: where the mask is written, uint8 of :func:`plane_length` elements; None leaves it out.
        operation: ``"add"``, ``"mul"``, ``"none"`` (a itself) or a function of a, such as ``"silu"``.
        arguments: the numbers of that operation, at most two, such as ``(0.1,)`` for ``"leaky_relu"``.
        grid: per tensor; updated in place if there are ``statistics``. None, a switch that is off, or an empty range
            leaves the result in float.
        statistics: the range behind the grid, which ``relu?(f(a, b))`` updates first; None updates nothing.
        ceiling: upper bound of the ReLU between operation and quantizer; infinity for a plain one, None without a ReLU.

    Raises:
        NotImplementedError: the grid has float codes; nothing is updated.
    """
    constants = grid_constants(grid)
    n, plane = y.numel(), plane_length(y.numel())
    chosen = flat_parameters("rounded", y, _ROUNDED)
    columns = max(1, chosen.elements // PLANES)
    with device_guard(y):
        snapshot = None if grid is None else _observe(operands, operation, arguments, grid, statistics, ceiling)
        if n == 0:
            return snapshot
        rounded_kernel[(triton.cdiv(plane, columns),)](
            *operands,
            y,
            mask,
            *grid_pointers(snapshot),
            n,
            plane,
            **operation_constants(operation, arguments),
            CEILING=ceiling,
            **constants,
            ROWS=PLANES,
            COLS=columns,
            WIDE=is_wide(n),
            num_warps=chosen.num_warps(warp_size(y.device)),
            enable_fp_fusion=False,
        )
    return snapshot


def mask_like(y: Tensor) -> Tensor:
    """Return uninitialised memory for the mask of ``y``'s gradient, on ``y``'s device.

    It is a vector of uint8 with a bit per element of ``y``, and has as many bytes as :func:`plane_length` says: an
    eighth of the elements, rounded up to a multiple of 16.
    """
    return torch.empty(plane_length(y.numel()), dtype=torch.uint8, device=y.device)


def plane_length(n: int) -> int:
    """Return the bytes of a mask with one bit for each of ``n`` elements: ``n / 8``, rounded up to a multiple of 16."""
    return -(-n // (PLANES * _ALIGNMENT)) * _ALIGNMENT


def laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` with the strides of the dense tensor ``y``: itself, or a copy if its strides differ.

    ``x`` must have ``y``'s shape, and keeps its own dtype.
    """
    return x if x.stride() == y.stride() else torch.empty_like(y, dtype=x.dtype).copy_(x)


def operation_constants(operation: str, arguments: tuple[float, ...]) -> dict[str, object]:
    """Return a kernel's constants for an operation and its numbers, at most two.

    ``"leaky_relu"`` and ``(0.1,)`` give ``{"OPERATION": "leaky_relu", "NUMBER": 0.1, "OTHER_NUMBER": None}``.
    """
    first, second = (*arguments, None, None)[:2]
    return {"OPERATION": operation, "NUMBER": first, "OTHER_NUMBER": second}


def _observe(
    operands: tuple[Tensor, Tensor | None],
    operation: str,
    arguments: tuple[float, ...],
    grid: Grid,
    statistics: RangeStatistics | None,
    ceiling: float | None,
) -> Grid:
    """Update range and grid with ``relu?(f(a, b))``, in place, and return a snapshot of the grid.

    The kernel finds the ends of ``f(a, b)``; the ReLU, up to ``ceiling`` (None: no ReLU), is applied to these. a and b
    are the ``operands``, f the ``operation`` with the numbers ``arguments``; without ``statistics``, the running range,
    or for an empty operand, nothing is updated.
    """
    a, n = operands[0], operands[0].numel()
    reads = sum(operand is not None for operand in operands)
    block = _RANGE_BYTES // (reads * a.element_size())
    chosen = flat_parameters("rounded_range", a, Parameters(block, block, _RANGE_WARPS))
    blocks = triton.cdiv(n, chosen.elements)
    share = triton.cdiv(blocks, max(1, min(blocks, programs_that_fill(a.device)))) * chosen.elements
    if n == 0:
        # One part whose range is not finite: nothing is merged.
        empty = torch.full((1,), torch.inf, device=a.device)
        return merge_range(empty, empty, 0, grid, statistics, ceiling)
    programs = triton.cdiv(n, share)
    low, high = torch.empty((2, programs), dtype=torch.float32, device=a.device).unbind(0)
    observing = observing_switch(statistics)
    if statistics is not None and observing is not None:
        rounded_range_kernel[(programs,)](
            *operands,
            low,
            high,
            statistics.nonfinite_count,
            observing,
            n,
            share,
            **operation_constants(operation, arguments),
            BLOCK=chosen.elements,
            # The end of the last share lies beyond the tensor.
            WIDE=is_wide(programs * share),
            num_warps=chosen.num_warps(warp_size(a.device)),
            enable_fp_fusion=False,
        )
    return merge_range(low, high, 0, grid, statistics, ceiling)
