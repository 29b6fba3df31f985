"""Functions of one tensor with the quantizer behind them: SiLU, Hardswish and a clip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from tritonq.perf.case import Case, Inputs, Tolerance
from tritonq.perf.cases.quantized_operators import Operator, implementations
from tritonq.perf.cases.quantizer_states import activation_state
from tritonq.reference.functions import Function

_ROUNDING = Tolerance(
    "the last bits of function and scale differ between float32 and float64, and with them ties",
    atol=1e-5,
    rtol=1e-4,
    fraction=3e-3,
)
# bfloat16 rounds the function's result to 8 bits before the range is taken.
_ROUNDING_BF16 = Tolerance("eager forms round the function to bfloat16 before they quantize it", distance=0.02)

# Exponential, division, product, range, round, clamp, two products; the function and its derivative backward.
_OPERATIONS = 16


@dataclass(frozen=True)
class QuantizedFunction:
    """``FQ(f(x))`` with an affine 0..255 quantizer, forward and backward."""

    function: Function
    shape: tuple[int, ...]
    dtype: torch.dtype

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``x`` and ``dy``, normal."""
        x, dy = (torch.randn(self.shape, generator=generator, device=device).to(self.dtype) for _ in range(2))
        return {"x": x.requires_grad_(), "dy": dy}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the result of plain operators in float64, on a grid whose range is that of this batch."""
        x = inputs["x"].detach().double().requires_grad_()
        y = self.function(x)
        (dx,) = torch.autograd.grad(y, x, inputs["dy"].double())
        low, high = y.detach().amin().clamp(max=0), y.detach().amax().clamp(min=0)
        scale = (high - low) / 255
        zero = (-low / scale).round()
        return (((y.detach() / scale).round() + zero).clamp(0, 255).sub(zero) * scale).to(self.dtype), dx.to(self.dtype)

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """Return the case.

        Least traffic: forward reads the input twice, writes once; the backward reads input and gradient, writes one.
        """
        shape, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        elements = prod(self.shape)
        return Case(
            name=f"functions/{self.function.name}/{shape}/{dtype}/forward+backward",
            family="functions",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=implementations(("x",), partial(_tritonq, self.function), self.function),
            baseline="torch.ao v1",
            bytes_moved=6 * elements * self.dtype.itemsize,
            operations=_OPERATIONS * elements,
            tolerance=_ROUNDING if self.dtype == torch.float32 else _ROUNDING_BF16,
            devices=devices,
            quick=quick,
        )


def _tritonq(function: Function, inputs: Inputs) -> Operator:
    from tritonq.functional.functions import quantized_function

    state = activation_state(inputs["x"].device)
    return lambda x: quantized_function(x, function, None, *state)


def cases() -> Iterator[Case]:
    """Yield activations of EfficientNet, MobileNetV3, YOLO and reduced-precision nets."""
    for function in (Function("silu"), Function("hardswish"), Function("clip", (-1.0, 1.0))):
        yield QuantizedFunction(function, (16, 64, 24, 24), torch.float32).case(quick=False, devices=("cpu", "cuda"))
        for dtype in (torch.float32, torch.bfloat16):
            yield QuantizedFunction(function, (256, 64, 56, 56), dtype).case(quick=False, devices=("cuda",))
