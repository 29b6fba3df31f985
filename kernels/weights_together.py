"""All weights of a model in one launch: a table on the device says where each one lies.

Small layers take less time than their launches. Quantizing a weight needs only the weight and its observer's state, so
one launch at the start of a step can do for all of them what `tritonq.kernels.weight` does for one. The function here
has the name, signature and results of `tritonq.reference.weights_together`, its specification.

A memory sanitizer cannot follow addresses that a kernel reads from memory. All accesses are in `quantize_rows`, which
the sanitizer checks through the kernel for one weight. `tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached_launch import Launcher
from .launch_sizes import device_guard, warp_size
from .quantized import Grid, RangeStatistics, grid_constants, has_data, observing_switch, range_constants, switch_of
from .weight import dense_rows
from .weight_rows import quantize_rows

# Eight elements for each of 128 lanes; longer rows are read in pieces of it.
_COLS = 1024
_LANES = 128

# Columns of the table, int64. Addresses are pointers as numbers.
_START = tl.constexpr(0)  # the program that has the weight's first row
_FIRST = tl.constexpr(1)  # where its rows lie among those of all weights
_LENGTH = tl.constexpr(2)  # elements per row
_CODES = tl.constexpr(3)  # where its codes start
_ROWS = tl.constexpr(4)  # addresses from here on
_SWITCH = tl.constexpr(5)
_OBSERVING = tl.constexpr(6)
_MIN = tl.constexpr(7)
_MAX = tl.constexpr(8)
_NONFINITE = tl.constexpr(9)
_SCALE = tl.constexpr(10)
_ZERO_POINT = tl.constexpr(11)
_COLUMNS = tl.constexpr(12)

# What weights of one launch have in common: averaging constant, eps, and the kernel's constants, (name, value) each.
_Kind = tuple[float | None, float, tuple[tuple[str, Any], ...]]


@triton.jit
def address(entry, COLUMN: tl.constexpr, dtype: tl.constexpr):
    """Load an address from the table, and return it as a pointer to elements of ``dtype``.

    ``entry`` points to the first column of the weight's row in the table, int64. COLUMN is the index of the column with
    the address; columns 0 to 3 hold numbers, and all others addresses.
    """
    return tl.load(entry + COLUMN).to(tl.pointer_type(dtype))


@Launcher
@triton.jit
def quantize_all_kernel(
    table_ptr,  # weights × _COLUMNS int64
    owner_ptr,  # (programs,) int32: the weight, a row of the table, that a program works on
    fold_ptr,  # (rows of all weights,) float32
    codes_ptr,  # float32, one weight behind the other; written
    vectors_ptr,  # 3 × rows of all weights, float32: unit, scale, 1 if the row was rounded (else 0); written
    zero_point_out,  # (rows of all weights,) int32: the zero points that were used; written if HAS_ZERO_POINT
    averaging_constant,  # of the running ranges; None: the extremes of all batches
    eps,  # smallest scale
    total,  # rows of all weights
    OBSERVES: tl.constexpr,  # whether ranges may be updated
    HAS_ZERO_POINT: tl.constexpr,  # whether quantizers have a zero point
    KNOWN: tl.constexpr,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED_ZERO_POINT: tl.constexpr,
    RULE: tl.constexpr,
    COPY_ABOVE: tl.constexpr,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    ROUNDING: tl.constexpr,
    COLS: tl.constexpr,  # elements of a row that are read at a time
):
    """Fold, observe and quantize one row of one weight: ``codes = clip(round(row · fold / s) + z) - z``, ``unit = s``.

    Each weight has two switches on the device. While that of rounding is off, or the row's range is empty, codes are
    ``row · fold`` and the unit is 1. Range, s and z are updated first, if OBSERVES and the weight's switch of observing
    is on. A row of the table has the numbers and addresses of one weight that ``_START`` to ``_ZERO_POINT`` name. The
    constants are the same for all weights of a launch.
    """
    program = tl.program_id(0)
    entry = table_ptr + tl.load(owner_ptr + program).to(tl.int64) * _COLUMNS
    channel = (program - tl.load(entry + _START)).to(tl.int32) + tl.arange(0, 1)
    first = tl.load(entry + _FIRST)
    out = vectors_ptr + first
    quantize_rows(
        address(entry, _ROWS, tl.float32),
        codes_ptr + tl.load(entry + _CODES),
        out,
        out + total,
        out + 2 * total,
        None,
        zero_point_out + first,
        tl.load(fold_ptr + first + channel)[:, None],
        address(entry, _SWITCH, tl.uint8),
        address(entry, _OBSERVING, tl.uint8) if OBSERVES else None,
        None if KNOWN and not OBSERVES else address(entry, _MIN, tl.float32),
        None if KNOWN and not OBSERVES else address(entry, _MAX, tl.float32),
        address(entry, _NONFINITE, tl.int64) if OBSERVES else None,
        address(entry, _SCALE, tl.float32),
        address(entry, _ZERO_POINT, tl.int32) if HAS_ZERO_POINT else None,
        averaging_constant,
        eps,
        channel,
        channel >= 0,
        tl.load(entry + _LENGTH).to(tl.int32),
        0,
        1,
        KNOWN,
        QUANT_MIN,
        QUANT_MAX,
        SYMMETRIC,
        FIXED_ZERO_POINT,
        RULE,
        COPY_ABOVE,
        CODE_MIN,
        CODE_MAX,
        ROUNDING,
        COLS,
        False,
    )


def quantize_all(
    rows: Sequence[Tensor], fold: Tensor, grids: Sequence[Grid], statistics: Sequence[RangeStatistics | None]
) -> list[tuple[Tensor, Tensor, bool, Grid]]:
    """Fold, observe and quantize all weights; return ``(codes, unit, True, snapshot)`` for each, in their order.

    ``codes = clip(round(rows · fold / unit) + zero_point) - zero_point``, and the unit is the scale, (out,). While a
    grid's switch is off, codes are ``rows · fold`` and units 1; so they are in rows whose range is empty. Ranges,
    scales and zero points are updated first, in place. Weights whose quantizers differ only in their tensors share a
    launch. Codes are float32, shaped as the weight; those of all weights are parts of one tensor. True says that
    something may have been clipped; the snapshot is a grid with copies of scale, zero point and switch, (out,) each.

    Args:
        rows: the weights, (out, ...) each, float32, all on one device.
        fold: the factors of all rows of all weights, one behind the other, float32.
        grids: one per weight, with one scale per row.
        statistics: per weight the running range of its grid, one per row; None: nothing is observed for that weight.
    """
    rows = [dense_rows(weight) for weight in rows]
    total, device = len(fold), fold.device
    codes = torch.empty(sum(weight.numel() for weight in rows), dtype=torch.float32, device=device)
    vectors = torch.empty((3, total), dtype=torch.float32, device=device)
    zero_points = torch.empty(total, dtype=torch.int32, device=device)
    kinds: dict[_Kind, list[tuple[int, ...]]] = {}
    first = at = 0
    held = []  # a switch that was made here must outlive the launch, which reads it by its address
    for weight, grid, running in zip(rows, grids, statistics, strict=True):
        entries = kinds.setdefault(_kind(grid, running), [])
        held.append(_tensors(weight, grid, running))
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in held[-1])
        entries.append((len(weight), first, weight[0].numel(), at, *addresses))
        first, at = first + len(weight), at + weight.numel()
    for kind, entries in kinds.items():
        _launch(kind, entries, fold, codes, vectors, zero_points)
    counts = [len(weight) for weight in rows]
    own_parts = zip(
        rows,
        grids,
        codes.split([weight.numel() for weight in rows]),
        vectors.split(counts, dim=1),
        zero_points.split(counts),
        strict=True,
    )
    return [
        (
            own.as_strided(weight.shape, weight.stride()),
            unit,
            True,
            grid.with_buffers(scale, zero_point if grid.zero_point is not None else None, active),
        )
        for weight, grid, own, (unit, scale, active), zero_point in own_parts
    ]


def _kind(grid: Grid, statistics: RangeStatistics | None) -> _Kind:
    """Return what the kernel takes of a quantizer beside its tensors: weights with equal results share a launch."""
    codes_range = grid_constants(grid)
    constants = {
        "OBSERVES": observing_switch(statistics) is not None,
        "HAS_ZERO_POINT": grid.zero_point is not None,
        "KNOWN": has_data(statistics),
        **range_constants(grid, statistics),
        "CODE_MIN": codes_range["QUANT_MIN"],
        "CODE_MAX": codes_range["QUANT_MAX"],
        "ROUNDING": codes_range["ROUNDING"],
    }
    averaging, eps = (None, 0.0) if statistics is None else (statistics.averaging_constant, statistics.eps)
    return averaging, eps, tuple(constants.items())


def _tensors(weight: Tensor, grid: Grid, statistics: RangeStatistics | None) -> tuple[Tensor | None, ...]:
    """Return a weight and its quantizer's tensors, in the order of the table's columns that hold addresses."""
    range_tensors: tuple[Tensor | None, ...] = (None, None, None)
    if statistics is not None:
        range_tensors = (statistics.min_val, statistics.max_val, statistics.nonfinite_count)
    return weight, switch_of(grid), observing_switch(statistics), *range_tensors, grid.scale, grid.zero_point


@lru_cache(maxsize=64)
def _table(device: torch.device, entries: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    """Return the table (int64) and the owner of each program (int32) on the device.

    Results are remembered, so they are copied to the device once for all steps in which no tensor moved.

    Args:
        device: of the weights.
        entries: one per weight of a launch: its number of rows, and its columns from ``_FIRST`` on.
    """
    counts = [entry[0] for entry in entries]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    table = [(start, *entry[1:]) for start, entry in zip(starts, entries, strict=True)]
    owner = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    return torch.tensor(table, dtype=torch.int64).to(device), owner.to(device)


def _launch(
    kind: _Kind,
    entries: list[tuple[int, ...]],
    fold: Tensor,
    codes: Tensor,
    vectors: Tensor,
    zero_points: Tensor,
) -> None:
    """Launch the kernel for weights whose quantizers have equal constants.

    Args:
        kind: what :func:`_kind` returned for each of the weights.
        entries: one per weight: its number of rows, and its columns of the table from ``_FIRST`` on.
        fold: the factors of all rows of all weights.
        codes: written.
        vectors: (3, rows) written: unit, scale, and whether rounding was on.
        zero_points: written.
    """
    averaging_constant, eps, constants = kind
    table, owner = _table(fold.device, tuple(entries))
    with device_guard(fold):
        quantize_all_kernel[(len(owner),)](
            table,
            owner,
            fold,
            codes,
            vectors,
            zero_points,
            averaging_constant,
            eps,
            len(fold),
            **dict(constants),
            COLS=_COLS,
            num_warps=_LANES // warp_size(fold.device),
            enable_fp_fusion=False,
        )
