"""Fixed point: rounding with its strict mask, the choice of the fractional length, and convolutions of 8-bit codes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.perf.case import Case, Inputs, Tolerance
from tritonq.perf.cases.fixed_point_peers import (
    conv_implementations,
    quantize_implementations,
    search_implementations,
)

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
    """Rounding and searches of activations and weights; convolutions of a ResNet-50."""
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
    yield Convolution(8, 64, 28, 64, 3).case(quick=True, devices=_BOTH)
    yield Convolution(8, 64, 28, 256, 1).case(quick=False, devices=_BOTH)
    yield Convolution(8, 128, 28, 128, 3, depthwise=True).case(quick=False, devices=_BOTH)
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        yield Convolution(256, channels, size, channels, 3).case(quick=False, devices=("cuda",))
        yield Convolution(256, channels, size, 4 * channels, 1).case(quick=False, devices=("cuda",))


def _name(*parts: object) -> str:
    return "/".join(["fixed_point", *map(str, parts)])


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@dataclass(frozen=True)
class Rounding:
    """`fixed_point_quantize`, signed 8-bit codes.

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
        """``x``, and ``dy`` for the backward, normal; ``frac_len`` int32: ranges of ±2 or ±4 standard deviations."""
        lengths = (1,) if self.axis is None else (self.shape[self.axis],)
        inputs = {
            "x": self._normal(generator, device).requires_grad_(self.backward),
            "frac_len": torch.randint(5, 7, lengths, generator=generator, device=device, dtype=torch.int32),
        }
        if self.backward:
            inputs["dy"] = self._normal(generator, device)
        return inputs

    def powers(self, inputs: Inputs) -> Tensor:
        """``2^frac_len``, float32, broadcast against ``x``."""
        powers = torch.exp2(inputs["frac_len"].float())
        if self.axis is None:
            return powers
        shape = [1] * len(self.shape)
        shape[self.axis] = -1
        return powers.view(shape)

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """``clamp(round(x 2^fl)) 2^-fl`` in float64; ``dy`` strictly inside the code range."""
        powers = self.powers(inputs).double()
        code = (inputs["x"].detach().double() * powers).round()
        y = (code.clamp(self.quant_min, self.quant_max) / powers).to(self.dtype)
        if not self.backward:
            return (y,)
        inside = (code > self.quant_min) & (code < self.quant_max)
        return y, torch.where(inside, inputs["dy"], 0)

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """The table entry: forward reads x and writes y; backward reads x and dy and writes dx."""
        elements = prod(self.shape)
        grid = "tensor" if self.axis is None else f"channel{self.axis}"
        direction = "forward+backward" if self.backward else "forward"
        dtype = str(self.dtype).removeprefix("torch.")
        return Case(
            name=_name("quantize", grid, _dims(self.shape), dtype, direction),
            family="fixed_point",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=quantize_implementations(self),
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
    """`search_frac_len` over a whole tensor: 8 candidates for signed 8-bit codes, 9 for unsigned ones."""

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
        """``x`` normal, behind a ReLU where codes have no sign: the best length is neither the first nor the last."""
        x = torch.randn(self.shape, generator=generator, device=device)
        return {"x": (x if self.signed else x.relu()).to(self.dtype)}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The first of the least root mean square errors, one candidate at a time in float64."""
        x = inputs["x"].double()
        codes = ((x * 2.0**length).round().clamp(*self.codes) for length in self.candidates)
        errors = [(code * 0.5**length - x).square().mean() for length, code in enumerate(codes)]
        return (torch.stack(errors).argmin().int(),)

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """The table entry: one read."""
        elements = prod(self.shape)
        sign = "signed" if self.signed else "unsigned"
        return Case(
            name=_name("search", sign, _dims(self.shape), str(self.dtype).removeprefix("torch.")),
            family="fixed_point",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=search_implementations(self),
            baseline="f8net",
            bytes_moved=elements * self.dtype.itemsize,
            operations=_CANDIDATE_OPERATIONS * len(self.candidates) * elements,
            tolerance=Tolerance("one integer, which no order of additions changes on this input"),
            devices=devices,
            quick=quick,
        )


@dataclass(frozen=True)
class Convolution:
    """One layer of the integer network: codes to codes, ``same`` padding, channels_last as its kernel likes it.

    Attributes:
        images: batch size.
        channels: of the input.
        size: height and width.
        outs: out channels.
        kernel: its height and width.
        depthwise: one filter per channel.
    """

    images: int
    channels: int
    size: int
    outs: int
    kernel: int
    depthwise: bool = False

    @property
    def groups(self) -> int:
        """Groups of the convolution."""
        return self.channels if self.depthwise else 1

    @property
    def products(self) -> int:
        """Multiplications per output."""
        return self.channels // self.groups * self.kernel**2

    @property
    def shift(self) -> int:
        """How far sums are shifted right: their deviation becomes about 96 codes.

        A product of such codes has a deviation of 73 · 147; those of sums grow with the root of their number.
        """
        return round(math.log2(73 * 147 * self.products**0.5 / 96))

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """``x`` uint8, ``weight`` int8, ``bias`` int32, ``shift`` int32 (out,): a tenth of the results saturates."""
        last = torch.channels_last
        integers = partial(torch.randint, generator=generator, device=device)
        shape = (self.outs, self.channels // self.groups, self.kernel, self.kernel)
        return {
            "x": integers(0, 256, (self.images, self.channels, self.size, self.size), dtype=torch.uint8).contiguous(
                memory_format=last
            ),
            "weight": integers(-127, 128, shape, dtype=torch.int8).contiguous(memory_format=last),
            "bias": integers(0, 64 << self.shift, (self.outs,), dtype=torch.int32),
            "shift": torch.full((self.outs,), self.shift, dtype=torch.int32, device=device),
        }

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """``clamp(round((Σ x w + bias) 2^-shift), 0, 255)`` in float64, which holds every sum."""
        x, weight, bias = (inputs[name].double() for name in ("x", "weight", "bias"))
        total = F.conv2d(x, weight, bias, padding=self.kernel // 2, groups=self.groups)
        return ((total * torch.exp2(-inputs["shift"].double()).view(1, -1, 1, 1)).round().clamp(0, 255).byte(),)

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """The table entry: codes in, codes out, weights once."""
        pixels = self.images * self.size**2
        weights = self.outs * self.products
        kind = "depthwise" if self.depthwise else f"{self.kernel}x{self.kernel}"
        shape = _dims((self.images, self.channels, self.size, self.size))
        return Case(
            name=_name("int8_conv", kind, shape, f"{self.outs}out"),
            family="fixed_point",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=conv_implementations(self),
            baseline="float convolution",
            bytes_moved=pixels * (self.channels + self.outs) + weights,
            operations=2 * pixels * weights,
            tolerance=Tolerance("integers: one result"),
            devices=devices,
            quick=quick,
        )
