"""A grid as numbers on the host, for layers that compute on codes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType

_MAX_CODES = 256


class HostGrid(NamedTuple):
    """A grid of one scale and up to 256 codes, as numbers on the host.

    Attributes:
        scale: the float32 scale.
        zero: the code of the value 0, counted from the smallest code on: ``zero_point - quant_min``.
        largest: the largest code, counted likewise: ``quant_max - quant_min``.
        half_even: whether ties go to the even code; else away from zero.
    """

    scale: float
    zero: int
    largest: int
    half_even: bool

    def to_grid(self) -> Grid:
        """Return the same grid in tensors, its codes counted from 0."""
        qtype = QuantizedType(0, self.largest, False, rounding="half_even" if self.half_even else "half_away")
        return Grid(torch.tensor([self.scale]), torch.tensor([self.zero], dtype=torch.int32), qtype)


def host_grid(grid: Grid) -> HostGrid | None:
    """Read a grid on the host; None for one with several scales or more than 256 codes, or off the CPU."""
    qtype = grid.qtype
    if qtype.axis is not None or qtype.quant_max - qtype.quant_min >= _MAX_CODES or not grid.scale.is_cpu:
        return None
    zero = 0 if grid.zero_point is None else int(grid.zero_point)
    return HostGrid(
        float(grid.scale), zero - qtype.quant_min, qtype.quant_max - qtype.quant_min, qtype.rounding == "half_even"
    )
