"""Integer codes of a trained weight, which every deployed layer holds."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.fake_quantize import FakeQuantizeBase
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.functional.groups import as_rows, group_rows
from tritonq.grid import Grid
from tritonq.reference.fake_quant import quantize
from tritonq.reference.float_rounding import codes_of_floats

QUANTIZERS = (FakeQuantizeBase, FloatFakeQuantize)


def rounds(quantizer: FakeQuantizeBase | FloatFakeQuantize) -> bool:
    """Whether a quantizer rounds in eval mode."""
    return quantizer.rounds() if isinstance(quantizer, FloatFakeQuantize) else quantizer.is_enabled_on_host()


def codes_of_rows(rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Return integer codes of ``rows`` (out, ...), and their scale and zero point per row or group."""
    qtype = grid.qtype
    groups = group_rows(rows, qtype.granularity)
    if groups is not None:
        codes, scale, zero = codes_of_rows(*as_rows(rows, grid))
        return groups.join(codes), groups.join_values(scale), groups.join_values(zero)
    if qtype.axis not in (None, 0):
        raise ValueError(f"its weight quantizer keeps one scale per index of axis {qtype.axis}, not per row")
    zeros = torch.zeros_like(grid.scale, dtype=torch.int32) if grid.zero_point is None else grid.zero_point
    scale, zero = (values.detach().reshape(-1).expand(len(rows)).clone() for values in (grid.scale, zeros))
    codes = quantize(rows.float(), Grid(scale, zero, qtype.with_axis(0)))
    if qtype.float_format is not None:
        codes = codes_of_floats(codes, qtype.float_format)
    return codes.to(qtype.storage_dtype), scale, zero


def unless_zero(zero_point: Tensor) -> Tensor | None:
    """Return None for zero points that are all 0: nothing to store."""
    return zero_point if bool(zero_point.any()) else None
