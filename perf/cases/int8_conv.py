"""Convolutions of 8-bit codes: layers of an integer network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance

_BOTH = ("cpu", "cuda")
_BFLOAT16 = Tolerance("results of bfloat16 have 8 bits: codes of up to 255 are off by one", atol=1.0)
_FLOAT32 = Tolerance(
    "sums above 2^24 round in float32, which turns ties over: one code, seldom", atol=1.0, fraction=1e-3
)


def cases() -> Iterator[Case]:
    """Yield convolutions of a ResNet-50."""
    yield Convolution(8, 64, 28, 64, 3).case(quick=True, devices=_BOTH)
    yield Convolution(8, 64, 28, 256, 1).case(quick=False, devices=_BOTH)
    yield Convolution(8, 128, 28, 128, 3, depthwise=True).case(quick=False, devices=_BOTH)
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        yield Convolution(256, channels, size, channels, 3).case(quick=False, devices=("cuda",))
        yield Convolution(256, channels, size, 4 * channels, 1).case(quick=False, devices=("cuda",))


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
        """Number of groups of the convolution."""
        return self.channels if self.depthwise else 1

    @property
    def products(self) -> int:
        """Number of products that are added for one result."""
        return self.channels // self.groups * self.kernel**2

    @property
    def shift(self) -> int:
        """How many bits sums are shifted right, so that results have a deviation of about 96 codes.

        A product of such codes has a deviation of 73 · 147; that of a sum grows with the root of the number of
        products.
        """
        return round(math.log2(73 * 147 * self.products**0.5 / 96))

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``x`` uint8, ``weight`` int8, ``bias`` and ``shift`` int32 (out,): a tenth of results saturates."""
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
        """Return ``clamp(round((Σ x w + bias) 2^-shift), 0, 255)`` in float64, which holds every sum."""
        x, weight, bias = (inputs[name].double() for name in ("x", "weight", "bias"))
        total = F.conv2d(x, weight, bias, padding=self.kernel // 2, groups=self.groups)
        return ((total * torch.exp2(-inputs["shift"].double()).view(1, -1, 1, 1)).round().clamp(0, 255).byte(),)

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """Return the case; least traffic: codes in, codes out, weights once."""
        pixels = self.images * self.size**2
        weights = self.outs * self.products
        kind = "depthwise" if self.depthwise else f"{self.kernel}x{self.kernel}"
        shape = f"{self.images}x{self.channels}x{self.size}x{self.size}"
        return Case(
            name=f"fixed_point/int8_conv/{kind}/{shape}/{self.outs}out",
            family="fixed_point",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=_implementations(self),
            baseline="float convolution",
            bytes_moved=pixels * (self.channels + self.outs) + weights,
            operations=2 * pixels * weights,
            tolerance=Tolerance("integers: one result"),
            devices=devices,
            quick=quick,
        )


def _implementations(problem: Convolution) -> dict[str, Implementation]:
    """Return tritonq; the convolution of floats that it replaces; torch's quantized operator, on CPUs alone.

    The float convolution is cuDNN's in bfloat16 on a GPU and oneDNN's in float32 on a CPU. Its check requantizes what
    it returns, which is not timed: a float network has no such step. Torch's depthwise kernel for x86 adds pairs of
    products in 16 bits, which saturate: it fails the check. On a CPU tritonq's is a proof, not a product: it computes
    in int32, for which torch has no fast convolution.
    """
    shift = problem.shift

    def to_codes(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((outputs[0].double() * 0.5**shift).round().clamp(0, 255).byte(),)

    return {
        "tritonq": Implementation(lambda _: _tritonq_conv(problem), distribution="tritonq", module="tritonq"),
        "float convolution": Implementation(
            lambda inputs: _float_conv(problem, inputs), tolerance=_BFLOAT16, for_check=to_codes
        ),
        "torch quantized": Implementation(
            lambda inputs: _torch_quantized_conv(problem, inputs),
            tolerance=_FLOAT32,
            devices=("cpu",),
            for_check=lambda outputs: (outputs[0].int_repr(),),
        ),
    }


def _tritonq_conv(problem: Convolution) -> Step:
    from tritonq.backend import implementation

    pad = problem.kernel // 2
    geometry: dict[str, Any] = {"stride": (1, 1), "padding": (pad, pad), "dilation": (1, 1), "groups": problem.groups}

    def convolve(inputs: Inputs) -> tuple[Tensor, ...]:
        operands = (inputs["x"], inputs["weight"], inputs["bias"], inputs["shift"])
        ops = implementation("int8_conv", inputs["x"])
        return (ops.int8_conv2d(*operands, **geometry, quant_min=0, quant_max=255, out_dtype=torch.uint8),)

    return convolve


def _float_conv(problem: Convolution, inputs: Inputs) -> Step:
    dtype = torch.bfloat16 if inputs["x"].is_cuda else torch.float32
    weight, bias = inputs["weight"].to(dtype), inputs["bias"].to(dtype)
    # A float network's activations are floats already: each set of inputs is converted once.
    converted: dict[int, Tensor] = {}

    def convolve(inputs: Inputs) -> tuple[Tensor, ...]:
        x = inputs["x"]
        values = converted.get(x.data_ptr())
        if values is None:
            values = converted[x.data_ptr()] = x.to(dtype)
        return (F.conv2d(values, weight, bias, padding=problem.kernel // 2, groups=problem.groups),)

    return convolve


def _torch_quantized_conv(problem: Convolution, inputs: Inputs) -> Step:
    """Return a step that runs torch's quantized convolution to the same codes.

    Both operands have scale 1, the result ``2^shift``.
    """
    quantized = torch._make_per_tensor_quantized_tensor
    pad, one = [problem.kernel // 2] * 2, [1, 1]
    weight = quantized(inputs["weight"], 1.0, 0)
    packed = torch.ops.quantized.conv2d_prepack(weight, inputs["bias"].float(), one, pad, one, problem.groups)
    scale = 2.0**problem.shift

    def convolve(inputs: Inputs) -> tuple[Tensor, ...]:
        x = quantized(inputs["x"], 1.0, 0)
        return (torch.ops.quantized.conv2d(x, packed, scale, 0),)

    return convolve
