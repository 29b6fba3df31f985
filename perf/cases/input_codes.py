"""Keeping an input for the backward as codes of one byte, and restoring it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tritonq.grid import Grid
from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance
from tritonq.quantized_type import QINT8

_SCALE = 0.03125
_EXACT = Tolerance("a value on the grid is restored bit for bit")
# A product and a rounding; a conversion and a product.
_OPERATIONS = 4


@dataclass(frozen=True)
class Problem:
    """A tensor whose values lie on a symmetric 8-bit grid, as its user knows."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``x`` on the grid, and its ``scale``."""
        codes = torch.randint(-128, 128, self.shape, generator=generator, device=device)
        return {"x": (codes * _SCALE).to(self.dtype), "scale": torch.full((1,), _SCALE, device=device)}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return ``x`` itself: keeping codes loses nothing."""
        return (inputs["x"],)

    def case(self, *, quick: bool, devices: tuple[str, ...] = ("cpu", "cuda")) -> Case:
        """Return the case.

        The least traffic is to read ``x`` and write a byte for each value, then to read the bytes and write ``x``.
        """
        elements = prod(self.shape)
        dtype = str(self.dtype).removeprefix("torch.")
        return Case(
            name=f"input_codes/{'x'.join(map(str, self.shape))}/{dtype}/forward+backward",
            family="input_codes",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations={
                "tritonq": Implementation(_tritonq, distribution="tritonq", module="tritonq"),
                "torch": Implementation(lambda _: _torch),
            },
            baseline="torch",
            bytes_moved=2 * (self.dtype.itemsize + 1) * elements,
            operations=_OPERATIONS * elements,
            tolerance=_EXACT,
            devices=devices,
            quick=quick,
        )


def cases() -> Iterator[Case]:
    """Yield activations of a CNN, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        yield Problem((16, 64, 56, 56), dtype).case(quick=False)


def _tritonq(inputs: Inputs) -> Step:
    from tritonq.backend import implementation

    ops = implementation("input_codes", inputs["x"])
    grid = Grid(inputs["scale"], None, QINT8)

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        codes = ops.encode(inputs["x"], grid, True)
        return (ops.decode(codes, inputs["x"].dtype),)

    return step


def _torch(inputs: Inputs) -> tuple[Tensor, ...]:
    """Keep ``x`` as int8 codes and restore it, by torch's own operators."""
    x, scale = inputs["x"], inputs["scale"]
    codes = torch.round(x / scale).to(torch.int8)
    return ((codes * scale).to(x.dtype),)
