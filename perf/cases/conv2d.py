"""Folded convolutions with bias, ReLU and fake quantization: the operator, and the layer in eval mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance
from tritonq.perf.cases.quantizer_states import torch_ao_layer, tritonq_layer

_OPERATOR = Tolerance(
    "sums in another order, or of tf32 products, move a few values over a tie; a missing tap is at a distance of 0.3",
    distance=0.02,
)
_LAYER = Tolerance(
    "the reference does not quantize: noise of 7 and 8 bits; a layer without its BatchNorm is at a distance of 0.25",
    distance=0.1,
)
_QUANT_MIN, _QUANT_MAX = -128, 127


@dataclass(frozen=True)
class Convolution:
    """A square convolution; padded so that a stride of one keeps the size."""

    batch: int
    channels: int
    size: int
    outs: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """Stride, padding, dilation and groups."""
        padding = self.kernel // 2
        return (self.stride, self.stride), (padding, padding), (1, 1), self.groups

    @property
    def output_elements(self) -> int:
        """Elements of the result."""
        size = (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1
        return self.batch * self.outs * size * size

    def name(self, kind: str, dtype: torch.dtype, channels_last: bool) -> str:
        """Return a case's name."""
        kernel = f"{self.kernel}x{self.kernel}" + (f" stride {self.stride}" if self.stride > 1 else "")
        kernel += "" if self.groups == 1 else " depthwise" if self.groups == self.channels else " grouped"
        shape = f"{self.batch}x{self.channels}x{self.size}x{self.size}"
        layout = ["channels_last"] if channels_last else []
        parts = ["conv2d", f"{kind} {kernel}", shape, str(dtype).removeprefix("torch."), *layout]
        return "/".join([*parts, "forward"])

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """Return the bytes of input, weight and output, once each."""
        inputs = self.batch * self.channels * self.size**2
        weights = self.outs * self.channels // self.groups * self.kernel**2
        return (inputs + weights + self.output_elements) * dtype.itemsize

    @property
    def operations(self) -> int:
        """Number of arithmetic operations: two for each product."""
        return 2 * self.output_elements * self.channels // self.groups * self.kernel**2


@dataclass(frozen=True)
class Operator:
    """A convolution of quantized values, ReLU, and fake quantization to 8 bits.

    On a GPU ``tritonq`` is the kernel, whatever the table of that GPU says.
    """

    conv: Convolution
    dtype: torch.dtype
    channels_last: bool
    devices: tuple[str, ...]

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``x``, ``weight``, ``bias``, and the output's ``scale``, with which some values are clipped."""
        conv = self.conv
        normal = partial(torch.randn, generator=generator, device=device)
        x = normal(conv.batch, conv.channels, conv.size, conv.size)
        weight = torch.randint(
            -127,
            128,
            (conv.outs, conv.channels // conv.groups, conv.kernel, conv.kernel),
            generator=generator,
            device=device,
        )
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        deviation = (conv.channels // conv.groups * conv.kernel**2) ** 0.5 * 0.73
        return {
            "x": x.to(self.dtype).contiguous(memory_format=layout),
            "weight": (weight / 100).to(self.dtype).contiguous(memory_format=layout),
            "bias": normal(conv.outs).to(self.dtype),
            "scale": torch.full((1,), 2 * deviation / _QUANT_MAX, device=device),
        }

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the result of plain operators in float64."""
        x, weight, bias = (inputs[name].double() for name in ("x", "weight", "bias"))
        y = F.relu(F.conv2d(x, weight, bias, *self.conv.geometry))
        scale = inputs["scale"].double()
        return ((y / scale).round().clamp(_QUANT_MIN, _QUANT_MAX).mul(scale).to(self.dtype),)

    def case(self, *, quick: bool = False) -> Case:
        """Return the case, whose baseline is torch's operators.

        These are cuDNN's convolution, ReLU and fake quantization, one by one.
        """
        table = {
            "tritonq": Implementation(self._tritonq, distribution="tritonq", module="tritonq"),
            "torch": Implementation(self._torch),
            "torch.compile(torch)": Implementation(partial(self._torch, compiled=True), quick=False),
        }
        return Case(
            name=self.conv.name("operator", self.dtype, self.channels_last),
            family="conv2d",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=table,
            baseline="torch",
            bytes_moved=self.conv.bytes_moved(self.dtype),
            operations=self.conv.operations,
            tolerance=_OPERATOR,
            devices=self.devices,
            quick=quick,
        )

    def _tritonq(self, inputs: Inputs) -> Step:
        from tritonq.backend import implementation
        from tritonq.grid import Grid
        from tritonq.quantized_type import QINT8

        conv2d = implementation("conv2d", inputs["x"]).conv2d

        def step(inputs: Inputs) -> tuple[Tensor, ...]:
            grid = Grid(inputs["scale"], None, QINT8)
            return (conv2d(inputs["x"], inputs["weight"], inputs["bias"], *self.conv.geometry, math.inf, grid),)

        return step

    def _torch(self, inputs: Inputs, *, compiled: bool = False) -> Step:
        zero_point = torch.zeros(1, dtype=torch.int32, device=inputs["x"].device)

        def forward(inputs: Inputs) -> Tensor:
            y = F.relu(F.conv2d(inputs["x"], inputs["weight"], inputs["bias"], *self.conv.geometry))
            return torch.fake_quantize_per_tensor_affine(y, inputs["scale"], zero_point, _QUANT_MIN, _QUANT_MAX)

        run = torch.compile(forward, dynamic=False) if compiled else forward
        return lambda inputs: (run(inputs),)


@dataclass(frozen=True)
class Layer:
    """Conv, BatchNorm and ReLU as a module in eval mode: its weight is folded and quantized in every call.

    tritonq knows the input's grid and computes in exact integers, as the deployed layer does; torch.ao in float.
    """

    conv: Convolution
    channels_last: bool
    devices: tuple[str, ...]

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``x`` on a grid of 8-bit codes."""
        conv = self.conv
        shape = (conv.batch, conv.channels, conv.size, conv.size)
        codes = torch.randint(-127, 128, shape, generator=generator, device=device)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return {"x": (codes * torch.tensor(1 / 64, device=device)).contiguous(memory_format=layout)}

    def parts(self) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
        """Return float modules with the same weights every time."""
        conv = self.conv
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            float_conv = nn.Conv2d(
                conv.channels, conv.outs, conv.kernel, conv.stride, conv.kernel // 2, groups=conv.groups, bias=False
            )
        bn = nn.BatchNorm2d(conv.outs)
        with torch.no_grad():
            cast(Tensor, bn.running_var).fill_(0.4)
            cast(Tensor, bn.running_mean).fill_(0.2)
        return float_conv, bn, nn.ReLU()

    @torch.no_grad()
    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the result of the float modules."""
        return (nn.Sequential(*self.parts()).to(inputs["x"].device).eval()(inputs["x"]),)

    def case(self, *, quick: bool = False) -> Case:
        """Return the case. The baseline is torch.ao's module."""
        makers = {"torch.ao v0": partial(self._torch_ao, 0), "torch.ao v1": partial(self._torch_ao, 1)}
        table = {name: Implementation(partial(self._step, make)) for name, make in makers.items()}
        ours = partial(self._step, self._tritonq)
        return Case(
            name=self.conv.name("layer", torch.float32, self.channels_last),
            family="conv2d",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations={"tritonq": Implementation(ours, distribution="tritonq", module="tritonq"), **table},
            baseline="torch.ao v1",
            bytes_moved=self.conv.bytes_moved(torch.float32),
            operations=self.conv.operations,
            tolerance=_LAYER,
            devices=self.devices,
            quick=quick,
        )

    def _step(self, make: Callable[[], nn.Module], inputs: Inputs) -> Step:
        """Return a step that runs a layer in eval mode.

        The layer observes one input in training before, while its statistics stay as they are.
        """
        module = make().to(inputs["x"].device)
        layer: Any = next(m for m in module.modules() if hasattr(m, "freeze_bn_stats"))
        layer.freeze_bn_stats()
        module.train()(inputs["x"])
        module.eval()

        @torch.no_grad()
        def step(inputs: Inputs) -> tuple[Tensor, ...]:
            return (module(inputs["x"]),)

        return step

    def _torch_ao(self, version: int) -> nn.Module:
        return torch_ao_layer(self.parts(), version)

    def _tritonq(self) -> nn.Module:
        layer = tritonq_layer(self.parts())
        source: Any = layer.qconfig.activation()
        source(torch.tensor([-127 / 64, 127 / 64]))
        layer.set_input_quantizer(source.eval())
        return _WithSource(layer, source)


class _WithSource(nn.Module):
    """A layer together with the quantizer of its input, so that both move to one device."""

    def __init__(self, layer: nn.Module, source: nn.Module) -> None:
        super().__init__()
        self.layer, self.source = layer, source

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def cases() -> Iterator[Case]:
    """Yield 1×1, 3×3, 7×7 and depthwise convolutions of ResNet-50 and MobileNetV2."""
    cpu, cuda = ("cpu",), ("cuda",)
    for channels_last in (False, True):
        yield Operator(Convolution(8, 32, 28, 32, 3), torch.float32, channels_last, ("cpu", "cuda")).case(
            quick=not channels_last
        )
        for conv in (
            Convolution(256, 64, 56, 256, 1),
            Convolution(256, 128, 28, 128, 3),
            Convolution(256, 256, 28, 256, 3, stride=2),
            Convolution(256, 3, 224, 64, 7, stride=2),
            Convolution(256, 144, 56, 144, 3, groups=144),
        ):
            for dtype in (torch.float32, torch.bfloat16):
                yield Operator(conv, dtype, channels_last, cuda).case()
            yield Layer(conv, channels_last, cuda).case()
        for conv in (
            Convolution(16, 64, 24, 64, 1),
            Convolution(16, 64, 24, 64, 3),
            Convolution(16, 64, 24, 64, 3, groups=64),
        ):
            yield Layer(conv, channels_last, cpu).case(quick=conv.kernel == 3 and conv.groups == 1)
