"""A result of an operation without a kernel of its own, observed and rounded: a concatenation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tritonq.perf.case import Case, Inputs
from tritonq.perf.cases.quantized_operators import ROUNDING, Operator, implementations
from tritonq.perf.cases.quantizer_states import STEPS, activation_state

# Range, round, clamp, two products; the backward selects.
_OPERATIONS = 7


@dataclass(frozen=True)
class Concatenation:
    """``FQ(cat(a, b))`` along the channels with an affine 0..255 quantizer, forward and backward; values from 0 on."""

    shape: tuple[int, ...]

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``a`` and ``b`` of ``shape``, and ``dy``."""
        channels_twice = (self.shape[0], 2 * self.shape[1], *self.shape[2:])
        a, b = (torch.rand(self.shape, generator=generator, device=device) for _ in range(2))
        dy = torch.randn(channels_twice, generator=generator, device=device)
        return {"a": a.requires_grad_(), "b": b.requires_grad_(), "dy": dy}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the result of plain operators in float64, on a grid whose range is that of this batch."""
        y = torch.cat([inputs["a"].detach(), inputs["b"].detach()], 1).double()
        scale = y.amax() / STEPS
        return ((y / scale).round() * scale).float(), *inputs["dy"].chunk(2, 1)

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """Return the case.

        Least traffic: forward copies once, reads twice and writes once; the backward reads one gradient and writes one.
        """
        elements = 2 * prod(self.shape)
        return Case(
            name="/".join(["rounded", "concatenation", "x".join(map(str, self.shape)), "float32", "forward+backward"]),
            family="rounded",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=implementations(("a", "b"), _tritonq, _float),
            baseline="torch.ao v1",
            bytes_moved=7 * 4 * elements + elements // 4,
            operations=_OPERATIONS * elements,
            tolerance=ROUNDING,
            devices=devices,
            quick=quick,
        )


def _tritonq(inputs: Inputs) -> Operator:
    from tritonq.functional.residual import rounded_result

    state = activation_state(inputs["a"].device)
    return lambda a, b: rounded_result(_float(a, b), *state, None)


def _float(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], 1)


def cases() -> Iterator[Case]:
    """Yield concatenations of a YOLO neck and of a U-Net."""
    for shape in ((16, 64, 24, 24), (32, 64, 56, 56)):
        yield Concatenation(shape).case(quick=False, devices=("cpu", "cuda"))
