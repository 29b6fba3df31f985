"""A grid as plain numbers on the host, for layers that compute on codes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType

_MAX_CODES = 256


class HostGrid(NamedTuple):
    """A grid with one scale and up to 256 codes, as plain numbers; codes are counted from 0.

    Attributes:
        scale: the float32 scale.
        zero: the code of the value 0: ``zero_point - quant_min``.
        largest: the largest code: ``quant_max - quant_min``.
        half_even: whether ties go to the even code; otherwise away from zero.
    """

    scale: float
    zero: int
    largest: int
    half_even: bool

    def to_grid(self) -> Grid:
        """Return the same grid with new tensors (1,) on the CPU, without a switch; its codes are counted from 0."""
        qtype = QuantizedType(0, self.largest, False, rounding="half_even" if self.half_even else "half_away")
        return Grid(torch.tensor([self.scale]), torch.tensor([self.zero], dtype=torch.int32), qtype)


def host_grid(grid: Grid) -> HostGrid | None:
    """Return a grid's numbers, codes counted from 0; None if it has an axis, over 256 codes, or is not on the CPU.

    Its codes must be integers: that is not checked. Its switch is not read.
    """
    qtype = grid.qtype
    if qtype.axis is not None or qtype.quant_max - qtype.quant_min >= _MAX_CODES or not grid.scale.is_cpu:
        return None
    zero = 0 if grid.zero_point is None else int(grid.zero_point)
    return HostGrid(
        float(grid.scale), zero - qtype.quant_min, qtype.quant_max - qtype.quant_min, qtype.rounding == "half_even"
    )
