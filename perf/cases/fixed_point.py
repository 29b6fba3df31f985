"""Fixed point: rounding with its strict mask, and the choice of the fractional length.

F8Net's code is not a package: its quantizer and its search are written here from their formulas (Jin et al., F8Net:
Fixed-Point 8-bit Only Multiplication for Network Quantization, 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance

_COMPILER = Tolerance("a compiler may keep bfloat16 intermediates, or not", atol=1e-6, rtol=1e-2, fraction=3e-3)
_EXACT = Tolerance("multiplying by a power of two is exact, so there is one result")

# round, clamp, two products; the backward compares twice and selects. One candidate of a search adds a difference, a
# square and a sum.
_FORWARD_OPERATIONS, _BACKWARD_OPERATIONS, _CANDIDATE_OPERATIONS = 5, 5, 7

_BOTH = ("cpu", "cuda")
_QUICK = (16, 64, 24, 24)
_CPU_ACTIVATION = (32, 64, 56, 56)
_CUDA_ACTIVATIONS = ((256, 64, 56, 56), (256, 64, 64, 64))
_WEIGHT = (512, 512, 3, 3)
_DTYPES = (torch.float32, torch.bfloat16)


def cases() -> Iterator[Case]:
    """Yield rounding and searches of activations and weights."""
    for dtype in _DTYPES:
        quick = dtype == torch.float32
        for backward in (False, True):
            yield Rounding(_QUICK, dtype, None, backward).case(quick=quick and backward, devices=_BOTH)
            yield Rounding(_WEIGHT, dtype, 0, backward).case(quick=False, devices=_BOTH)
            yield Rounding(_CPU_ACTIVATION, dtype, None, backward).case(quick=False, devices=("cpu",))
            for shape in _CUDA_ACTIVATIONS:
                yield Rounding(shape, dtype, None, backward).case(quick=False, devices=("cuda",))
        yield Search(_QUICK, dtype, signed=False).case(quick=quick, devices=_BOTH)
        yield Search(_WEIGHT, dtype, signed=True).case(quick=False, devices=_BOTH)
        yield Search(_CPU_ACTIVATION, dtype, signed=False).case(quick=False, devices=("cpu",))
        for shape in _CUDA_ACTIVATIONS:
            yield Search(shape, dtype, signed=False).case(quick=False, devices=("cuda",))


def _name(*parts: object) -> str:
    return "/".join(["fixed_point", *map(str, parts)])


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@dataclass(frozen=True)
class Rounding:
    """A case of `fixed_point_quantize` to signed 8-bit codes.

    Attributes:
        axis: axis of the fractional lengths; None for one.
        backward: include the gradient of the input.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None
    backward: bool
    quant_min: int = -127
    quant_max: int = 127

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return normal values ``x``, for the backward also ``dy``, and ``frac_len`` int32.

        The fractional lengths give ranges of ±2 or ±4 standard deviations.
        """
        lengths = (1,) if self.axis is None else (self.shape[self.axis],)
        inputs = {
            "x": self._normal(generator, device).requires_grad_(self.backward),
            "frac_len": torch.randint(5, 7, lengths, generator=generator, device=device, dtype=torch.int32),
        }
        if self.backward:
            inputs["dy"] = self._normal(generator, device)
        return inputs

    def powers(self, inputs: Inputs) -> Tensor:
        """Return ``2^frac_len``, float32, broadcast against ``x``."""
        powers = torch.exp2(inputs["frac_len"].float())
        if self.axis is None:
            return powers
        shape = [1] * len(self.shape)
        shape[self.axis] = -1
        return powers.view(shape)

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return ``clamp(round(x 2^fl)) 2^-fl`` in float64.

        For the backward also the gradient: ``dy`` strictly inside the code range, else 0.
        """
        powers = self.powers(inputs).double()
        code = (inputs["x"].detach().double() * powers).round()
        y = (code.clamp(self.quant_min, self.quant_max) / powers).to(self.dtype)
        if not self.backward:
            return (y,)
        inside = (code > self.quant_min) & (code < self.quant_max)
        return y, torch.where(inside, inputs["dy"], 0)

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """Return the case; least traffic: forward reads x and writes y; backward reads x and dy and writes dx."""
        elements = prod(self.shape)
        grid = "tensor" if self.axis is None else f"channel{self.axis}"
        direction = "forward+backward" if self.backward else "forward"
        dtype = str(self.dtype).removeprefix("torch.")
        return Case(
            name=_name("quantize", grid, _dims(self.shape), dtype, direction),
            family="fixed_point",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=_quantize_implementations(self),
            baseline="f8net",
            bytes_moved=(5 if self.backward else 2) * elements * self.dtype.itemsize,
            operations=(_FORWARD_OPERATIONS + (_BACKWARD_OPERATIONS if self.backward else 0)) * elements,
            tolerance=_EXACT,
            devices=devices,
            quick=quick,
        )

    def _normal(self, generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.randn(self.shape, generator=generator, device=device).to(self.dtype)


@dataclass(frozen=True)
class Search:
    """A case of `search_frac_len` over a whole tensor: 8 candidates for signed 8-bit codes, 9 for unsigned ones."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    signed: bool

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return (-127, 127) if self.signed else (0, 255)

    @property
    def candidates(self) -> range:
        """The fractional lengths that are tried."""
        return range(9 - self.signed)

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return normal values ``x``, after a ReLU if codes are unsigned.

        The best length is neither the least nor the largest.
        """
        x = torch.randn(self.shape, generator=generator, device=device)
        return {"x": (x if self.signed else x.relu()).to(self.dtype)}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the fractional length with the least root mean square error, the first of several.

        One candidate is tried at a time, in float64.
        """
        x = inputs["x"].double()
        codes = ((x * 2.0**length).round().clamp(*self.codes) for length in self.candidates)
        errors = [(code * 0.5**length - x).square().mean() for length, code in enumerate(codes)]
        return (torch.stack(errors).argmin().int(),)

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """Return the case; least traffic: one read."""
        elements = prod(self.shape)
        sign = "signed" if self.signed else "unsigned"
        return Case(
            name=_name("search", sign, _dims(self.shape), str(self.dtype).removeprefix("torch.")),
            family="fixed_point",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=_search_implementations(self),
            baseline="f8net",
            bytes_moved=elements * self.dtype.itemsize,
            operations=_CANDIDATE_OPERATIONS * len(self.candidates) * elements,
            tolerance=Tolerance("one integer, which no order of additions changes on this input"),
            devices=devices,
            quick=quick,
        )


def _quantize_implementations(problem: Rounding) -> dict[str, Implementation]:
    """Return the implementations of rounding.

    They are tritonq, F8Net's autograd function, and torch's operator, which is timed forward only because its mask is
    not strict.
    """
    table = {
        "tritonq": Implementation(lambda _: _tritonq_quantize(problem), distribution="tritonq", module="tritonq"),
        "f8net": Implementation(lambda inputs: _f8net_quantize(problem, inputs, compiled=False)),
        "torch.compile(f8net)": Implementation(
            lambda inputs: _f8net_quantize(problem, inputs, compiled=True), tolerance=_COMPILER, quick=False
        ),
    }
    if not problem.backward:
        table["torch"] = Implementation(lambda inputs: _torch_quantize(problem, inputs))
    return table


def _search_implementations(problem: Search) -> dict[str, Implementation]:
    """Return the implementations of the search; tritonq reads ``x`` once, F8Net once per candidate."""
    return {
        "tritonq": Implementation(lambda _: _tritonq_search(problem), distribution="tritonq", module="tritonq"),
        "f8net": Implementation(lambda _: _f8net_search(problem)),
    }


def _with_gradient(problem: Rounding, quantize: Any) -> Step:
    """Return a step that quantizes by ``quantize``, and differentiates if the problem asks for it.

    ``quantize`` takes the inputs and returns the result.
    """

    def forward(inputs: Inputs) -> tuple[Tensor, ...]:
        return (quantize(inputs),)

    def forward_backward(inputs: Inputs) -> tuple[Tensor, ...]:
        y = quantize(inputs)
        return y, *torch.autograd.grad(y, inputs["x"], inputs["dy"])

    return forward_backward if problem.backward else forward


def _tritonq_quantize(problem: Rounding) -> Step:
    import tritonq

    return _with_gradient(
        problem, lambda inputs: tritonq.fixed_point_quantize(inputs["x"], inputs["frac_len"], axis=problem.axis)
    )


class _FixQuant(torch.autograd.Function):
    """F8Net's quantizer: it keeps the mask of the codes strictly inside for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, powers: Tensor, low: int, high: int) -> Tensor:
        codes = (x * powers).round().clamp(low, high)
        ctx.save_for_backward((codes > low) & (codes < high))
        return (codes / powers).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy * ctx.saved_tensors[0], None, None, None


def _f8net_quantize(problem: Rounding, inputs: Inputs, *, compiled: bool) -> Step:
    powers, low, high = problem.powers(inputs), problem.quant_min, problem.quant_max

    def quantize(x: Tensor) -> Tensor:
        y: Tensor = _FixQuant.apply(x, powers, low, high)  # type: ignore[no-untyped-call]
        return y

    called = torch.compile(quantize, dynamic=False) if compiled else quantize
    return _with_gradient(problem, lambda inputs: called(inputs["x"]))


def _torch_quantize(problem: Rounding, inputs: Inputs) -> Step:
    limits = (problem.quant_min, problem.quant_max)
    scale = torch.exp2(-inputs["frac_len"].float())
    zero_point = torch.zeros_like(inputs["frac_len"])
    if problem.axis is None:
        return lambda inputs: (torch.fake_quantize_per_tensor_affine(inputs["x"], scale, zero_point, *limits),)
    axis = problem.axis
    return lambda inputs: (torch.fake_quantize_per_channel_affine(inputs["x"], scale, zero_point, axis, *limits),)


def _tritonq_search(problem: Search) -> Step:
    import tritonq

    return lambda inputs: (tritonq.search_frac_len(inputs["x"], signed=problem.signed),)


def _f8net_search(problem: Search) -> Step:
    """Search as F8Net does: a quantized copy and a mean of squares for every candidate, then the least."""
    low, high = problem.codes

    def search(inputs: Inputs) -> tuple[Tensor, ...]:
        x = inputs["x"].float()
        errors = []
        for length in problem.candidates:
            rounded = (x * 2.0**length).round().clamp(low, high) / 2.0**length
            errors.append((rounded - x).square().mean().sqrt())
        return (torch.stack(errors).argmin().int(),)

    return search
