"""Modules with a quantizer of their output, what counts as one, and what is known of the tensor that it makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, TypeGuard, cast, runtime_checkable

from torch import nn

from tritonq.grid import Grid
from tritonq.nn.fusable import ceiling_of
from tritonq.nn.reference import ReferringModule
from tritonq.qconfig import QConfig
from tritonq.quantized_type import QuantizedType


class WithOutputQuantizer(ReferringModule):
    """A module with a quantizer of its output; without a qconfig it has none."""

    def __init__(self, qconfig: QConfig | None = None) -> None:
        super().__init__()
        self.activation_post_process: nn.Module = nn.Identity() if qconfig is None else qconfig.activation()


@runtime_checkable
class GridSource(Protocol):
    """Puts values on a grid of integers: a fake quantizer, or what it became in deployment."""

    qtype: QuantizedType

    def is_enabled_on_host(self) -> bool:
        """Whether it rounds. May synchronise with the device."""

    def grid(self) -> Grid:
        """Return the grid, with its switch on the device."""


def is_grid_source(module: object) -> TypeGuard[GridSource]:
    """Whether ``module`` is a :class:`GridSource` of integers; faster than ``isinstance`` of a protocol."""
    kind = type(module)
    if not callable(getattr(kind, "is_enabled_on_host", None)) or not callable(getattr(kind, "grid", None)):
        return False
    # What computes on codes takes integers.
    return cast(GridSource, module).qtype.float_format is None


def quantizer_of(producer: nn.Module | None) -> nn.Module | None:
    """Return the quantizer of a producer's output, which may be the producer."""
    if producer is None or is_grid_source(producer):
        return cast("nn.Module | None", producer)
    return producer._modules.get("activation_post_process")


def ends_in_relu(producer: nn.Module | None) -> bool:
    """Whether the output of a producer went through a ReLU before its quantizer."""
    ceiling = getattr(producer, "ceiling", None)
    return ceiling is not None or ceiling_of(producer) is not None


def deployed_grid(grid: Grid, relu: bool) -> Grid:
    """Return the grid with the codes that deployment has: behind a ReLU from that of zero on, if the type fixes it."""
    zero = grid.qtype.fixed_zero_point
    if zero is None or not relu:
        return grid
    return Grid(grid.scale, grid.zero_point, replace(grid.qtype, quant_min=zero, symmetric=False), grid.enabled)
