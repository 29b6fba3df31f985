"""The integer codes of a trained weight, as deployed layers hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.functional.groups import as_rows, group_rows
from tritonq.functional.validate import check_axis
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType
from tritonq.reference.fake_quant import quantize
from tritonq.reference.float_blocks import block_scales
from tritonq.reference.float_rounding import codes_of_floats, round_to_float_

QUANTIZERS = (FakeQuantizeBase, FloatFakeQuantize)


def rounds(quantizer: FakeQuantizeBase | FloatFakeQuantize) -> bool:
    """Whether a quantizer rounds in eval mode: it is switched on, and its scale rests on data or on the tensor itself.

    May wait for the device.
    """
    return quantizer.rounds() if isinstance(quantizer, FloatFakeQuantize) else quantizer.is_enabled_on_host()


def codes_of_rows(rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(codes, scale, zero_point)`` of a weight's rows (out, ...): one scale and zero point per row or group.

    Args:
        rows: the float weight, folded; its first axis is that of the out channels.
        grid: has one scale, one per row, or one per group of consecutive elements of an axis. Its switch is not read.

    Returns:
        Codes shaped as ``rows``, in the smallest integer dtype that holds all codes of the grid's type; scale (float32)
        and zero point (int32), both (out,), new tensors. With groups these two have the shape of ``rows``, but the
        groups' axis is as long as it has groups: (4, 2) for rows of (4, 64) in groups of 32 along axis 1.

    Raises:
        ValueError: the grid has one scale per index of an axis that is not given as 0, or groups that don't divide
            their axis.
    """
    qtype = grid.qtype
    groups = group_rows(rows, qtype.granularity)
    if groups is not None:
        codes, scale, zero = codes_of_rows(*as_rows(rows, grid))
        return groups.join(codes), groups.join_values(scale), groups.join_values(zero)
    if qtype.axis is not None and check_axis(rows, qtype.axis) != 0:
        raise ValueError(f"its weight quantizer keeps one scale per index of axis {qtype.axis}, not per row")
    zeros = torch.zeros_like(grid.scale, dtype=torch.int32) if grid.zero_point is None else grid.zero_point
    scale, zero = (values.detach().reshape(-1).expand(len(rows)).clone() for values in (grid.scale, zeros))
    codes = quantize(rows.float(), Grid(scale, zero, qtype.with_axis(0)))
    if qtype.float_format is not None:
        codes = codes_of_floats(codes, qtype.float_format)
    return codes.to(qtype.storage_dtype), scale, zero


def weight_type(quantizer: FakeQuantizeBase | FloatFakeQuantize) -> QuantizedType | None:
    """Return the quantized type of a weight's codes; None if the weight stays in float.

    It stays in float if the quantizer is switched off, or its scale does not rest on data yet. For a weight in blocks
    of floats the type has groups of the block's size along axis 1: of 32 for ``"mxfp8"``.
    """
    if not rounds(quantizer):
        return None
    blocks = quantizer.blocks if isinstance(quantizer, FloatFakeQuantize) else None
    return (
        quantizer.qtype if blocks is None else replace(QuantizedType.of_floats(blocks.elements, 1), group=blocks.size)
    )


def codes_of_weight(
    rows: Tensor, quantizer: FakeQuantizeBase | FloatFakeQuantize, grid: Callable[[], Grid] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(codes, scale, zero_point)`` of a weight's ``rows``: one scale and zero point per row or group.

    Args:
        rows: (out, in, ...), the float weight, folded.
        quantizer: the weight's; it must be switched on, with a scale that rests on data or on the tensor itself.
        grid: a function that returns the grid to use; None: the quantizer's own. Not called for blocks of floats, whose
            scales follow from ``rows``.

    Returns:
        Codes shaped as ``rows``, in the smallest integer dtype that holds all codes of the type (of floats: int8, 0 for
        0, n for the format's n-th positive number, -n for its opposite); scale (float32) and zero point (int32), both
        (out,). With groups or blocks these two have the shape of ``rows``, but the axis of the groups is as long as it
        has groups: (4, 2) for rows of (4, 64) and blocks of 32.

    Raises:
        ValueError: one scale per index of an axis that is not given as 0, groups or blocks that don't divide their
            axis, or blocks along another axis than 1.
    """
    blocks = quantizer.blocks if isinstance(quantizer, FloatFakeQuantize) else None
    if blocks is None or not isinstance(quantizer, FloatFakeQuantize):
        return codes_of_rows(rows, quantizer.grid() if grid is None else grid())
    reason = why_no_blocks(rows, quantizer)
    if reason is not None:
        raise ValueError(reason)
    rows = rows.float()
    scale = block_scales(rows, blocks, 1, quantizer.tensor_scale)
    along = scale.repeat_interleave(blocks.size, 1)
    # A block of zeros may have a scale of 0.
    steps = torch.where(along == 0, 0.0, quantizer.rounded(rows) / along)
    codes = codes_of_floats(round_to_float_(steps, blocks.element_format), blocks.element_format)
    return codes, scale, torch.zeros_like(scale, dtype=torch.int32)


def why_no_blocks(rows: Tensor, quantizer: FloatFakeQuantize) -> str | None:
    """Return why a weight of these ``rows`` (out, in, ...) has no deployed form in blocks of floats.

    A block is a run of elements along an axis that share a scale (:class:`tritonq.formats.BlockFormat`). There is such
    a form if the blocks run along axis 1 and their size divides its length. None: the weight has it, or the quantizer
    has no blocks. A reason reads ``"mxfp4 has a deployed form where its blocks of 32 divide the input channels (axis
    1), and here they lie along axis 1 of 48: give this layer 8 bits, by a QConfigMapping"``.
    """
    axis, size = quantizer.block_axis(rows), 1 if quantizer.blocks is None else quantizer.blocks.size
    if size == 1 or (axis == 1 and rows.shape[1] % size == 0):
        return None
    return (
        f"{quantizer.format} has a deployed form where its blocks of {size} divide the input channels (axis 1), and "
        f"here they lie along axis {axis} of {rows.shape[axis]}: give this layer 8 bits, by a QConfigMapping"
    )


def unless_zero(zero_point: Tensor) -> Tensor | None:
    """Return ``zero_point`` itself, or None if all its elements are 0; waits for its device."""
    return zero_point if bool(zero_point.any()) else None
