"""Floats of eight bits with one scale for the tensor, forward and backward, against another library's emulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tritonq.perf.case import Case, Implementation, Inputs, Tolerance

_EXACT = Tolerance("multiplies by the reciprocal of a power of two, rounds once: equal bit for bit")
_OTHER_MASK = Tolerance(
    "its gradient stops at the largest number, and not half a step beyond it, where values still round to that",
    rtol=0.0,
    atol=0.0,
    fraction=1e-3,
)
# A power of two, by which dividing and multiplying by the reciprocal are the same.
_SCALE = 2.0**-7
_LARGEST = 448.0
# Scaling, rounding by two sums, clamp and scaling back; backward a comparison and a choice.
_OPERATIONS = {"forward": 8, "step": 16}


@dataclass(frozen=True)
class Problem:
    """A tensor that is rounded to E4M3.

    Attributes:
        phase: ``"forward"``, or ``"step"`` with the gradient.
        shape: of the tensor.
        dtype: of the tensor.
    """

    phase: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The name of the case, such as ``float_elements/forward/4096x4096/bfloat16``."""
        shape = "x".join(map(str, self.shape))
        return f"float_elements/{self.phase}/{shape}/{str(self.dtype).removeprefix('torch.')}"

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``x``, of which some values saturate, the gradient ``dy`` and the scale."""
        x, dy = (torch.randn(self.shape, generator=generator, device=device).to(self.dtype) for _ in range(2))
        return {"x": x, "dy": dy, "scale": torch.full((1,), _SCALE, device=device)}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return ``x`` rounded by torch's own dtype, and the gradient, which is 0 where values saturate."""
        steps = inputs["x"].float() / inputs["scale"]
        y = (steps.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).float() * inputs["scale"]).to(self.dtype)
        if self.phase == "forward":
            return (y,)
        # What rounds to more than the largest number lies half a step beyond it.
        return y, torch.where(steps.abs() <= _LARGEST + 16, inputs["dy"], 0)

    def case(self, *, quick: bool) -> Case:
        """Return the case; least traffic: one read and one write forward, two and one backward."""
        elements = prod(self.shape)
        return Case(
            name=self.name,
            family="float_elements",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=_implementations(self),
            baseline="eager formula",
            bytes_moved=(2 if self.phase == "forward" else 5) * elements * self.dtype.itemsize,
            operations=_OPERATIONS[self.phase] * elements,
            tolerance=_EXACT,
            quick=quick,
        )


def _implementations(problem: Problem) -> dict[str, Implementation]:
    def ours(inputs: Inputs) -> Callable[[Inputs], tuple[Tensor, ...]]:
        import tritonq

        return _run(problem, lambda x, scale: tritonq.fake_quantize_float(x, "fp8_e4m3", scale))

    def modelopt(inputs: Inputs) -> Callable[[Inputs], tuple[Tensor, ...]]:
        from modelopt.torch.quantization.tensor_quant import scaled_e4m3

        return _run(problem, lambda x, scale: scaled_e4m3(x, scale * _LARGEST, None, 4, 3, None, False))

    return {
        "tritonq": Implementation(ours, distribution="tritonq", module="tritonq"),
        "eager formula": Implementation(lambda inputs: problem.reference),
        "nvidia-modelopt": Implementation(
            modelopt, tolerance=_OTHER_MASK, distribution="nvidia-modelopt", module="modelopt"
        ),
    }


def _run(problem: Problem, quantize: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Return a step that runs a function and, where it is timed, its gradient."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        if problem.phase == "forward":
            with torch.no_grad():
                return (quantize(inputs["x"], inputs["scale"]),)
        x = inputs["x"].detach().requires_grad_()
        y = quantize(x, inputs["scale"])
        return y.detach(), *torch.autograd.grad(y, x, inputs["dy"])

    return run


_QUICK = (64, 1024)
_SHAPES = ((1024, 1024), (4096, 4096))


def cases() -> Iterator[Case]:
    """Yield tensors of linear layers, in both dtypes."""
    for phase in ("forward", "step"):
        yield Problem(phase, _QUICK, torch.float32).case(quick=True)
        for dtype in (torch.float32, torch.bfloat16):
            for shape in _SHAPES:
                yield Problem(phase, shape, dtype).case(quick=False)
