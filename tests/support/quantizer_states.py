"""Quantizers as operators take them, a grid and its range, in pairs that start alike."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tritonq.grid import Grid, RangeStatistics
from tritonq.quantized_type import QuantizedType

Part = TypeVar("Part", Grid, RangeStatistics)
# What operators take where there is no quantizer.
NO_QUANTIZER = (None, None)


class QuantizerState(NamedTuple):
    """A grid, and the running range behind it."""

    grid: Grid
    statistics: RangeStatistics

    def with_range(self, **changes: Any) -> QuantizerState:
        """Change fields of the range."""
        return QuantizerState(self.grid, replace(self.statistics, **changes))

    def with_grid(self, **changes: Any) -> QuantizerState:
        """Change fields of the grid."""
        return QuantizerState(replace(self.grid, **changes), self.statistics)


def quantizer_state(
    qtype: QuantizedType,
    channels: int = 1,
    *,
    device: str = "cpu",
    averaging: float | None = 0.1,
    copy_above: float | None = 1.2,
    rule: str = "torch",
    observing: bool = True,
    active: bool = True,
) -> QuantizerState:
    """Return a quantizer that has seen nothing yet."""
    shape = () if qtype.axis is None else (channels,)
    count = 1 if qtype.axis is None else channels
    grid = Grid(
        torch.ones(count, device=device),
        None if qtype.fixed_zero_point == 0 else torch.zeros(count, dtype=torch.int32, device=device),
        qtype,
        torch.tensor([active], dtype=torch.uint8, device=device),
    )
    statistics = RangeStatistics(
        torch.full(shape, torch.inf, device=device),
        torch.full(shape, -torch.inf, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
        qtype.granularity,
        torch.tensor([observing], dtype=torch.uint8, device=device),
        averaging_constant=averaging,
        copy_above=copy_above,
        rule=rule,
        eps=1e-7,
    )
    return QuantizerState(grid, statistics)


def moved(part: Part, device: str) -> Part:
    """Return the same with its tensors on ``device``."""
    tensors = {field.name: getattr(part, field.name) for field in fields(part)}
    return replace(part, **{name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)})


def moved_state(state: QuantizerState, device: str) -> QuantizerState:
    """Return the same with its tensors on ``device``."""
    return QuantizerState(moved(state.grid, device), moved(state.statistics, device))


def assert_same_state(actual: QuantizerState, expected: QuantizerState) -> None:
    """Range, count and qparams are equal bit for bit."""
    actual, expected = moved_state(actual, "cpu"), moved_state(expected, "cpu")
    names = [(1, "min_val"), (1, "max_val"), (1, "nonfinite_count"), (0, "scale"), (0, "zero_point")]
    for part, name in names:
        mine, other = getattr(actual[part], name), getattr(expected[part], name)
        assert (mine is None) == (other is None)
        if mine is not None:
            assert torch.equal(mine, other), (name, mine, other)
