"""Fake quantization alone: given scale and zero point, per tensor and per channel, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tritonq.perf.case import Case, Inputs, Tolerance
from tritonq.perf.cases.fake_quant_peers import implementations

# The grid ends at 1.5 to 3 standard deviations, so that clipping and its gradient are exercised.
_SHORTEST_RANGE, _LONGEST_RANGE = 1.5, 3.0

_EXACT = Tolerance("same float32 arithmetic in the same order, rounded once: equal bit for bit")

# round, clamp, two products, and for the backward a comparison and a product.
_FORWARD_OPERATIONS, _BACKWARD_OPERATIONS = 5, 6


@dataclass(frozen=True)
class Problem:
    """One fake quantization: what the input looks like and which grid it is rounded to.

    Attributes:
        axis: axis of the scales; None for one scale.
        backward: include the gradient of the input.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None
    channels_last: bool
    backward: bool
    quant_min: int = -128
    quant_max: int = 127

    @property
    def name(self) -> str:
        """``fake_quant/tensor/16x64x24x24/float32/forward`` and the like."""
        parts = ["fake_quant", "tensor" if self.axis is None else f"channel{self.axis}"]
        parts += ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        parts += ["channels_last"] if self.channels_last else []
        return "/".join([*parts, "forward+backward" if self.backward else "forward"])

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """``x``, and ``dy`` for the backward, normal; ``scale`` float32 and ``zero_point`` int32 (one or channels)."""
        channels = 1 if self.axis is None else self.shape[self.axis]
        spread = torch.rand(channels, generator=generator, device=device) * (_LONGEST_RANGE - _SHORTEST_RANGE)
        inputs = {
            "x": self._normal(generator, device).requires_grad_(self.backward),
            "scale": (_SHORTEST_RANGE + spread) / self.quant_max,
            "zero_point": torch.zeros(channels, dtype=torch.int32, device=device),
        }
        if self.backward:
            inputs["dy"] = self._normal(generator, device)
        return inputs

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """``(clamp(round(x * (1/s)) + z) - z) * s`` in float32; ``dy`` where the unclipped code is in range."""
        x, scale, zero_point = inputs["x"].detach().float(), inputs["scale"], inputs["zero_point"]
        if self.axis is not None:
            shape = [1] * x.dim()
            shape[self.axis] = -1
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        code = torch.round(x * (1.0 / scale)) + zero_point
        y = ((code.clamp(self.quant_min, self.quant_max) - zero_point) * scale).to(self.dtype)
        if not self.backward:
            return (y,)
        inside = (code >= self.quant_min) & (code <= self.quant_max)
        return y, torch.where(inside, inputs["dy"], torch.zeros_like(inputs["dy"]))

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """The table entry: forward reads x and writes y; backward reads x and dy and writes dx."""
        elements = prod(self.shape)
        passes = 5 if self.backward else 2
        operations = _FORWARD_OPERATIONS + (_BACKWARD_OPERATIONS if self.backward else 0)
        return Case(
            name=self.name,
            family="fake_quant",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=implementations(self),
            baseline="torch",
            bytes_moved=passes * elements * self.dtype.itemsize,
            operations=operations * elements,
            tolerance=_EXACT,
            devices=devices,
            quick=quick,
        )

    def _normal(self, generator: torch.Generator, device: torch.device) -> Tensor:
        values = torch.randn(self.shape, generator=generator, device=device).to(self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values


_SMALL = (64, 64)
_QUICK = (16, 64, 24, 24)
_CPU_ACTIVATIONS = ((32, 64, 56, 56), (32, 2048, 7, 7))
_CUDA_ACTIVATIONS = ((256, 64, 56, 56), (256, 2048, 7, 7), (256, 64, 64, 64))
_WEIGHTS = ((64, 3, 7, 7), (128, 128, 3, 3), (512, 512, 3, 3), (2048, 512, 1, 1))
_DTYPES = (torch.float32, torch.bfloat16)
_BOTH = ("cpu", "cuda")


def cases() -> Iterator[Case]:
    """Small tensors, weights and activations, in both layouts and dtypes, forward and with backward."""
    for backward in (False, True):
        for dtype in _DTYPES:
            yield from _for_grid(dtype, backward)


def _for_grid(dtype: torch.dtype, backward: bool) -> Iterator[Case]:
    quick = dtype == torch.float32
    for axis in (None, 0):
        yield Problem(_SMALL, dtype, axis, False, backward).case(quick=quick and axis is None, devices=_BOTH)
    for shape in _WEIGHTS:
        problem = Problem(shape, dtype, 0, False, backward, quant_min=-127)
        yield problem.case(quick=quick and shape == _WEIGHTS[-1], devices=_BOTH)
    for axis in (None, 1):
        for channels_last in (False, True):
            yield Problem(_QUICK, dtype, axis, channels_last, backward).case(
                quick=quick and not channels_last, devices=_BOTH
            )
            for shape in _CPU_ACTIVATIONS:
                yield Problem(shape, dtype, axis, channels_last, backward).case(quick=False, devices=("cpu",))
            for shape in _CUDA_ACTIVATIONS:
                yield Problem(shape, dtype, axis, channels_last, backward).case(quick=False, devices=("cuda",))
