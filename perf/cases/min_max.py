"""Observing and fake quantizing: what a training step does to every activation and weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance

_EXACT = Tolerance("same float32 arithmetic on the same range: equal bit for bit")
_OTHER_ARITHMETIC = Tolerance(
    "derives the scale in float64, or lets a compiler reorder: its last bit, and with it ties, may differ",
    atol=1e-6,
    rtol=1e-5,
    fraction=3e-3,
)
_OTHER_RULE = Tolerance(
    "version 1 has its own rule for symmetric scales, so that every code may differ: two 8-bit grids of nearly the "
    "same step are at a distance of about 0.01",
    distance=0.02,
)

# Range, round, clamp, two products; the backward compares and multiplies.
_FORWARD_OPERATIONS, _BACKWARD_OPERATIONS = 7, 6


@dataclass(frozen=True)
class Problem:
    """An activation (affine per tensor, 0..255) or, with ``weight``, a weight (symmetric per channel, -128..127).

    Both keep a moving average of the range; the first batch's range is copied.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    weight: bool
    channels_last: bool
    backward: bool

    @property
    def name(self) -> str:
        """The name of the case, such as ``observe/activation/16x64x24x24/float32/forward``."""
        parts = ["observe", "weight" if self.weight else "activation", "x".join(map(str, self.shape))]
        parts += [str(self.dtype).removeprefix("torch.")] + (["channels_last"] if self.channels_last else [])
        return "/".join([*parts, "forward+backward" if self.backward else "forward"])

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return normal values ``x``, and ``dy`` for the backward.

        Activations are shifted, so that the zero point is not the middle of the codes.
        """
        inputs = {"x": self._normal(generator, device, 0.0 if self.weight else 1.0).requires_grad_(self.backward)}
        if self.backward:
            inputs["dy"] = self._normal(generator, device, 0.0)
        return inputs

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return ``x`` fake quantized by the range of this batch and torch's rules; the range contains all of ``x``."""
        x = inputs["x"].detach().float()
        dims = tuple(range(1, x.dim())) if self.weight else tuple(range(x.dim()))
        low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
        if self.weight:
            quant_min, quant_max = -128, 127
            scale, zero_point = torch.maximum(-low, high) / 127.5, torch.zeros_like(low)
        else:
            quant_min, quant_max = 0, 255
            scale = (high - low) / 255
            zero_point = (-torch.round(low / scale)).clamp(quant_min, quant_max)
        code = torch.round(x * (1.0 / scale)) + zero_point
        y = ((code.clamp(quant_min, quant_max) - zero_point) * scale).to(self.dtype)
        if not self.backward:
            return (y,)
        inside = (code >= quant_min) & (code <= quant_max)
        return y, torch.where(inside, inputs["dy"], torch.zeros_like(inputs["dy"]))

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments that make the fake quantizer in torch.ao and in tritonq."""
        if self.weight:
            return {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
        return {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8, "qscheme": torch.per_tensor_affine}

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """Return the case.

        Least traffic: a weight, whose rows fit on chip, is read once, an activation twice, and either is written once;
        the backward reads two tensors and writes one.
        """
        elements = prod(self.shape)
        passes = (2 if self.weight else 3) + (3 if self.backward else 0)
        operations = _FORWARD_OPERATIONS + (_BACKWARD_OPERATIONS if self.backward else 0)
        return Case(
            name=self.name,
            family="observe",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=_implementations(self),
            baseline="torch.ao v0",
            bytes_moved=passes * elements * self.dtype.itemsize,
            operations=operations * elements,
            tolerance=_EXACT,
            devices=devices,
            quick=quick,
        )

    def _normal(self, generator: torch.Generator, device: torch.device, mean: float) -> Tensor:
        values = (torch.randn(self.shape, generator=generator, device=device) + mean).to(self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values


def _implementations(problem: Problem) -> dict[str, Implementation]:
    version_1 = _OTHER_RULE if problem.weight else _OTHER_ARITHMETIC
    table = {
        "tritonq": Implementation(partial(_step, problem, _tritonq), distribution="tritonq", module="tritonq"),
        "torch.ao v0": Implementation(partial(_step, problem, _torch_ao_v0)),
        "torch.ao v1": Implementation(partial(_step, problem, _torch_ao_v1), tolerance=version_1),
    }
    compiled = (
        ("torch.ao v0", _torch_ao_v0, _OTHER_ARITHMETIC),
        ("torch.ao v1", _torch_ao_v1, version_1),
        ("tritonq", _tritonq, _OTHER_ARITHMETIC),
    )
    for name, make, tolerance in compiled:
        build = partial(_step, problem, make, compiled=True)
        table[f"torch.compile({name})"] = Implementation(build, tolerance=tolerance, quick=False)
    return table


def _step(
    problem: Problem, make: Callable[[Problem, int], nn.Module], inputs: Inputs, *, compiled: bool = False
) -> Step:
    quantizer = make(problem, problem.shape[0]).to(inputs["x"].device).train()
    quantize = torch.compile(quantizer, dynamic=False) if compiled else quantizer

    def forward(inputs: Inputs) -> tuple[Tensor, ...]:
        return (quantize(inputs["x"]),)

    def forward_backward(inputs: Inputs) -> tuple[Tensor, ...]:
        y = quantize(inputs["x"])
        return y, *torch.autograd.grad(y, inputs["x"], inputs["dy"])

    return forward_backward if problem.backward else forward


def _tritonq(problem: Problem, channels: int) -> nn.Module:
    import tritonq
    from tritonq.observers import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

    if problem.weight:
        observer = MovingAveragePerChannelMinMaxObserver
        return tritonq.FakeQuantize(observer, ch_axis=0, num_channels=channels, **problem.arguments())
    return tritonq.FakeQuantize(MovingAverageMinMaxObserver, **problem.arguments())


def _torch_ao_v0(problem: Problem, channels: int) -> nn.Module:
    from torch.ao.quantization import FakeQuantize

    return _torch_ao(FakeQuantize, problem)


def _torch_ao_v1(problem: Problem, channels: int) -> nn.Module:
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize

    return _torch_ao(FusedMovingAvgObsFakeQuantize, problem)


def _torch_ao(kind: type[nn.Module], problem: Problem) -> nn.Module:
    from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

    if problem.weight:
        return kind(MovingAveragePerChannelMinMaxObserver, ch_axis=0, **problem.arguments())
    return kind(MovingAverageMinMaxObserver, **problem.arguments())


_QUICK = (16, 64, 24, 24)
_CPU_ACTIVATIONS = ((32, 64, 56, 56), (32, 2048, 7, 7))
_CUDA_ACTIVATIONS = ((256, 64, 56, 56), (256, 2048, 7, 7), (256, 64, 64, 64))
_WEIGHTS = ((64, 3, 7, 7), (128, 128, 3, 3), (512, 512, 3, 3), (2048, 512, 1, 1))
_BOTH = ("cpu", "cuda")


def cases() -> Iterator[Case]:
    """Yield activations in both layouts and weights, float32 and bfloat16, forward and with backward."""
    for backward in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            yield from _for_dtype(dtype, backward)


def _for_dtype(dtype: torch.dtype, backward: bool) -> Iterator[Case]:
    quick = dtype == torch.float32 and backward
    yield Problem((64, 64), dtype, False, False, backward).case(quick=False, devices=_BOTH)
    for shape in _WEIGHTS:
        problem = Problem(shape, dtype, True, False, backward)
        yield problem.case(quick=quick and shape == _WEIGHTS[1], devices=_BOTH)
    for channels_last in (False, True):
        yield Problem(_QUICK, dtype, False, channels_last, backward).case(quick=quick, devices=_BOTH)
        for shape in _CPU_ACTIVATIONS:
            yield Problem(shape, dtype, False, channels_last, backward).case(quick=False, devices=("cpu",))
        for shape in _CUDA_ACTIVATIONS:
            yield Problem(shape, dtype, False, channels_last, backward).case(quick=False, devices=("cuda",))
