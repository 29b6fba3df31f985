"""Grids for tests of operators, from the numbers that the tests are written in."""

from __future__ import annotations

from torch import Tensor

import tritonq
from tritonq.grid import Grid
from tritonq.qconfig import PRESETS
from tritonq.quantized_type import QuantizedType, Rounding


def grid_of(
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    rounding: Rounding = "half_even",
    enabled: Tensor | None = None,
) -> Grid:
    """Return the affine grid of these codes."""
    return Grid(scale, zero_point, QuantizedType(quant_min, quant_max, False, axis, rounding), enabled)


def presets_for_any_width() -> dict[str, tritonq.QConfig]:
    """Return the presets that suit models of any width; those of groups have groups of one channel."""
    found = {}
    for name, preset in PRESETS.items():
        qtype = getattr(preset.weight(), "qtype", None)
        if getattr(qtype, "group", None) is None:
            found[name] = preset
        elif "groups" not in found:
            weight = preset.weight.with_args(dtype=QuantizedType.of(qtype.bits, axis=1, group=1))
            found["groups"] = preset._replace(weight=weight)
    return found
