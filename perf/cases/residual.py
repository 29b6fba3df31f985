"""The residual join: addition, ReLU, observation and fake quantization."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.perf.case import Case, Inputs, Tolerance
from tritonq.perf.cases.quantized_operators import ROUNDING, Operator, implementations
from tritonq.perf.cases.quantizer_states import STEPS, activation_state

# bfloat16 rounds the sum of the eager forms to 8 bits before the range is taken.
_ROUNDING_BF16 = Tolerance("eager forms round the sum to bfloat16 before they quantize it", distance=0.02)

# Add, ReLU, range, round, clamp, two products; the backward selects.
_OPERATIONS = 9


@dataclass(frozen=True)
class Join:
    """``FQ(relu(a + b))`` with an affine 0..255 quantizer, forward and backward."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``a``, ``b``, ``dy``, normal."""
        a, b, dy = (self._normal(generator, device) for _ in range(3))
        return {"a": a.requires_grad_(), "b": b.requires_grad_(), "dy": dy}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the result of plain operators in float64, on a grid whose range is that of this batch."""
        total = inputs["a"].detach().double() + inputs["b"].detach().double()
        y = total.clamp(min=0)
        scale = y.amax() / STEPS
        dy = torch.where(total > 0, inputs["dy"], torch.zeros_like(inputs["dy"]))
        return ((y / scale).round() * scale).to(self.dtype), dy, dy

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """Return the case.

        Least traffic: forward reads both inputs twice and writes once; the backward reads one gradient and writes one.
        """
        parts = ["residual", "join", "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        parts += ["channels_last"] if self.channels_last else []
        elements = prod(self.shape)
        return Case(
            name="/".join([*parts, "forward+backward"]),
            family="residual",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=implementations(("a", "b"), _tritonq, _float, compiled=True),
            baseline="torch.ao v1",
            # One bit per element is written and read besides.
            bytes_moved=7 * elements * self.dtype.itemsize + elements // 4,
            operations=_OPERATIONS * elements,
            tolerance=ROUNDING if self.dtype == torch.float32 else _ROUNDING_BF16,
            devices=devices,
            quick=quick,
        )

    def _normal(self, generator: torch.Generator, device: torch.device) -> Tensor:
        values = torch.randn(self.shape, generator=generator, device=device).to(self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values


def _tritonq(inputs: Inputs) -> Operator:
    from tritonq.functional.residual import residual_join

    state = activation_state(inputs["a"].device)
    return lambda a, b: residual_join(a, b, *state, math.inf)


def _float(a: Tensor, b: Tensor) -> Tensor:
    return F.relu(a + b)


def cases() -> Iterator[Case]:
    """Yield joins of ResNet's stages, in both layouts."""
    for channels_last in (False, True):
        for shape in ((16, 64, 24, 24), (32, 64, 56, 56)):
            yield Join(shape, torch.float32, channels_last).case(quick=False, devices=("cpu", "cuda"))
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((256, 64, 56, 56), (256, 2048, 7, 7)):
                yield Join(shape, dtype, channels_last).case(quick=False, devices=("cuda",))
