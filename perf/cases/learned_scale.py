"""Learned scales: LSQ, LSQ+, TQT and PACT, forward with the gradients of the input and of what is learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal

import torch
from torch import Tensor

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance

Method = Literal["lsq", "lsq+", "tqt", "pact"]
# From x and the parameters, by name, to y.
Quantizer = Callable[[Tensor, Inputs], Tensor]

_SUMS = Tolerance(
    "values and masks are equal; a scale's gradient is a float32 sum in another order. One mask turned over in a "
    "hundred million would show",
    distance=1e-4,
)
_PEER = Tolerance(
    "divides where others multiply by the reciprocal, or adds the zero point before rounding: ties and the outermost "
    "half code turn over",
    distance=0.03,
)

# round, clamp, two products; the backward recomputes them, compares, and sums two products.
_OPERATIONS = 5 + 10
# Reads x, writes y; reads x and dy, writes dx.
_PASSES = 5
# The grid ends at 2 standard deviations, so that clipped values count.
_RANGE = 2.0

_BOTH = ("cpu", "cuda")
_QUICK = (16, 64, 24, 24)
_CPU_ACTIVATION = (32, 64, 56, 56)
_CUDA_ACTIVATIONS = ((256, 64, 56, 56), (256, 64, 64, 64))
_WEIGHT = (512, 512, 3, 3)


def cases() -> Iterator[Case]:
    """Yield one scale for activations, one per channel for weights, and LSQ along the channels of an activation."""
    methods: tuple[Method, ...] = ("lsq", "lsq+", "tqt", "pact")
    for method in methods:
        quick = method in ("lsq", "tqt")
        yield Problem(method, _QUICK, None).case(quick=quick, devices=_BOTH)
        yield Problem(method, _CPU_ACTIVATION, None).case(quick=False, devices=("cpu",))
        for shape in _CUDA_ACTIVATIONS:
            for dtype in (torch.float32, torch.bfloat16):
                yield Problem(method, shape, None, dtype).case(quick=False, devices=("cuda",))
    for method in methods[::2]:
        yield Problem(method, _WEIGHT, 0).case(quick=method == "lsq", devices=_BOTH)
    yield Problem("lsq+", _QUICK, 1).case(quick=False, devices=_BOTH)


@dataclass(frozen=True)
class Problem:
    """A quantizer with a learned scale, and its parameters.

    Attributes:
        method: LSQ learns a scale, LSQ+ a zero point too, TQT the scale's logarithm, PACT a clipping level.
        axis: axis of the parameters; None for one of each.
    """

    method: Method
    shape: tuple[int, ...]
    axis: int | None
    dtype: torch.dtype = torch.float32

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return (0, 255) if self.method in ("lsq+", "pact") else (-128, 127)

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the parameters that receive a gradient."""
        return {"lsq": ("scale",), "lsq+": ("scale", "zero_point"), "tqt": ("log2",), "pact": ("alpha",)}[self.method]

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``x`` and ``dy`` normal; parameters float32, (1,) or (channels,), for a range of ±2 deviations."""
        channels = (1,) if self.axis is None else (self.shape[self.axis],)
        spread = 1 + 0.1 * torch.rand(channels, generator=generator, device=device)
        scale = spread * _RANGE / 127.5
        values = {
            "scale": scale,
            "zero_point": torch.full_like(scale, 128.0 if self.method == "lsq+" else 0.0),
            "log2": scale.log2(),
            "alpha": spread * _RANGE,
        }
        inputs = {
            "x": torch.randn(self.shape, generator=generator, device=device).to(self.dtype).requires_grad_(),
            "dy": torch.randn(self.shape, generator=generator, device=device).to(self.dtype),
        }
        used = ("scale", "zero_point") if self.method == "lsq" else self.learned
        return inputs | {name: values[name].requires_grad_(name in self.learned) for name in used}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return results and gradients by the formulas of docs/numbers.md, "Learned scales".

        They are computed in float32, sums in float64.
        """
        x, dy = inputs["x"].detach().float(), inputs["dy"]
        given = {name: self.broadcast(inputs[name].detach()) for name in inputs if name not in ("x", "dy")}
        y, inside, terms = _TERMS[self.method](x, given, self.codes)
        gradients = [self._summed(term.double() * dy.double()) for term in terms]
        return y.to(self.dtype), torch.where(inside, dy, 0), *gradients

    def broadcast(self, values: Tensor) -> Tensor:
        """Return parameters in a shape that broadcasts against x."""
        if self.axis is None:
            return values
        shape = [1] * len(self.shape)
        shape[self.axis] = -1
        return values.view(shape)

    def _summed(self, terms: Tensor) -> Tensor:
        total = terms.sum() if self.axis is None else terms.movedim(self.axis, 0).flatten(1).sum(1)
        return total.view(-1).float()

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """Return the case: a step forward and backward."""
        elements = prod(self.shape)
        grid = "tensor" if self.axis is None else f"channel{self.axis}"
        table = {
            "tritonq": Implementation(partial(_step, self, _tritonq), distribution="tritonq", module="tritonq"),
            "eager formula": Implementation(partial(_step, self, _formula), tolerance=_PEER),
            "torch.compile(formula)": Implementation(
                partial(_step, self, _formula, compiled=True), tolerance=_PEER, quick=False
            ),
        }
        if self.method in ("lsq", "lsq+"):
            table["torch"] = Implementation(partial(_step, self, _torch_learnable), tolerance=_PEER)
        return Case(
            name="/".join(
                [
                    *("learned_scale", self.method, grid, "x".join(map(str, self.shape))),
                    *(str(self.dtype).removeprefix("torch."), "forward+backward"),
                ]
            ),
            family="learned_scale",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=table,
            baseline="torch" if "torch" in table else "eager formula",
            bytes_moved=_PASSES * elements * self.dtype.itemsize,
            operations=_OPERATIONS * elements,
            tolerance=_SUMS,
            devices=devices,
            quick=quick,
        )


def _step(problem: Problem, make: Callable[[Problem], Quantizer], inputs: Inputs, *, compiled: bool = False) -> Step:
    del inputs
    quantize = torch.compile(make(problem), dynamic=False) if compiled else make(problem)

    def forward_backward(inputs: Inputs) -> tuple[Tensor, ...]:
        y = quantize(inputs["x"], inputs)
        wanted = [inputs["x"], *(inputs[name] for name in problem.learned)]
        return y, *torch.autograd.grad(y, wanted, inputs["dy"])

    return forward_backward


def _tritonq(problem: Problem) -> Quantizer:
    import tritonq

    codes, axis = problem.codes, problem.axis
    if problem.method == "tqt":
        return lambda x, given: tritonq.trained_threshold_quantize(x, given["log2"], *codes, axis=axis)
    if problem.method == "pact":
        return lambda x, given: tritonq.clipped_quantize(x, given["alpha"], codes[1], axis=axis)
    if problem.method == "lsq":
        return lambda x, given: tritonq.fake_quantize_learnable(x, given["scale"], 0, *codes, axis)
    return lambda x, given: tritonq.fake_quantize_learnable(x, given["scale"], given["zero_point"], *codes, axis)


def _torch_learnable(problem: Problem) -> Quantizer:
    codes, axis = problem.codes, problem.axis
    if axis is None:
        per_tensor = torch._fake_quantize_learnable_per_tensor_affine
        return lambda x, given: per_tensor(x, given["scale"], given["zero_point"], *codes, 1.0)
    per_channel = torch._fake_quantize_learnable_per_channel_affine
    return lambda x, given: per_channel(x, given["scale"], given["zero_point"], axis, *codes, 1.0)


def _formula(problem: Problem) -> Quantizer:
    """Return the quantizer in plain operators.

    A rounding has gradient 1 (straight-through), a clamp its own.
    """
    low, high = problem.codes

    def learned_step(x: Tensor, given: Inputs) -> Tensor:
        scale, shift = problem.broadcast(given["scale"]), problem.broadcast(given["zero_point"])
        code = _straight_through(x.float() / scale, torch.round) + shift
        return ((code.clamp(low, high) - shift) * scale).to(x.dtype)

    def trained_threshold(x: Tensor, given: Inputs) -> Tensor:
        scale = torch.exp2(problem.broadcast(given["log2"]))
        bounded = (x.float() / scale).clamp(low - 0.5, high + 0.5)
        return (_straight_through(bounded, lambda v: _round_away(v).clamp(low, high)) * scale).to(x.dtype)

    def clipped(x: Tensor, given: Inputs) -> Tensor:
        alpha = problem.broadcast(given["alpha"])
        scale = alpha.detach() / high
        level = torch.minimum(x.float().clamp(min=0), alpha)
        return _straight_through(level, lambda v: (v / scale).round() * scale).to(x.dtype)

    return {"tqt": trained_threshold, "pact": clipped}.get(problem.method, learned_step)


def _straight_through(values: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``change(values)`` with the gradient of ``values``."""
    return values + (change(values) - values).detach()


def _round_away(values: Tensor) -> Tensor:
    return torch.copysign((values.abs() + 0.5).floor(), values)


Terms = tuple[Tensor, Tensor, tuple[Tensor, ...]]


def _step_terms(x: Tensor, given: Inputs, codes: tuple[int, int], learns_shift: bool) -> Terms:
    """Return what the gradients of LSQ and LSQ+ consist of.

    These are the values, where the gradient passes, and what each value adds to the gradients of the parameters.
    """
    scale, shift = given["scale"], given["zero_point"]
    v = x * (1.0 / scale)
    code = v.round() + shift
    inside = (code >= codes[0]) & (code <= codes[1])
    steps = code.clamp(*codes) - shift
    per_scale = torch.where(inside, steps - v, steps)
    per_shift = torch.where(inside, 0.0, -scale)
    return steps * scale, inside, (per_scale, per_shift) if learns_shift else (per_scale,)


def _threshold_terms(x: Tensor, given: Inputs, codes: tuple[int, int]) -> Terms:
    """Return what the gradient of TQT consists of.

    These are the values, where the gradient passes, and what each value adds to the gradient of the parameter.
    """
    scale = torch.exp2(given["log2"])
    v = x / scale
    inside = (v >= codes[0] - 0.5) & (v <= codes[1] + 0.5)
    code = _round_away(v).clamp(*codes)
    return code * scale, inside, (torch.where(inside, code - v, code) * scale * math.log(2),)


def _clipping_terms(x: Tensor, given: Inputs, codes: tuple[int, int]) -> Terms:
    """Return what the gradient of PACT consists of.

    These are the values, where the gradient passes, and what each value adds to the gradient of the parameter.
    """
    alpha = given["alpha"]
    scale = alpha / codes[1]
    y = (x * (1.0 / scale)).round().clamp(*codes) * scale
    return y, (x >= 0) & (x < alpha), ((x >= alpha).float(),)


_TERMS: dict[Method, Callable[[Tensor, Inputs, tuple[int, int]], Terms]] = {
    "lsq": partial(_step_terms, learns_shift=False),
    "lsq+": partial(_step_terms, learns_shift=True),
    "tqt": _threshold_terms,
    "pact": _clipping_terms,
}
