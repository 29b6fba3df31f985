"""Convolution with BatchNorm, ReLU and fake quantization: the whole layer, and what follows the convolution alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance
from tritonq.perf.cases.quantizer_states import (
    STEPS,
    activation_state,
    torch_ao_activation,
    torch_ao_layer,
    tritonq_layer,
)
from tritonq.perf.memory import peak_bytes, saved_bytes

_EPS, _MOMENTUM = 1e-5, 0.1

_TAIL = Tolerance(
    "float32 statistics move a few values over a tie, and float does not quantize: noise of 8 bits. A missing term of "
    "the BatchNorm's gradient is at a distance of 0.1 or more",
    distance=0.02,
)
_LAYER = Tolerance(
    "the reference does not quantize: noise of 7 or 8 bits, most in the nine weights of a depthwise row; a missing "
    "gradient is at distance 1",
    distance=0.3,
)

# Statistics three, affine two, ReLU, round, clamp, two products; the backward recomputes and reduces as much again.
_TAIL_OPERATIONS = 22
# What the best implementation reads and writes of the activation: forward 2 reads and a write, backward 4 and one.
_TAIL_PASSES = 8


@dataclass(frozen=True)
class Tail:
    """BatchNorm in training, ReLU, observation and fake quantization (affine, 0..255) of a convolution's output.

    tritonq's two passes are called directly; autograd's bookkeeping, some microseconds, is not part of them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    devices: tuple[str, ...]

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``c`` and ``dy`` (batch, channels, h, w), whose means are not zero.

        Also ``gamma``, ``beta`` and ``fold``, all of (channels,).
        """
        channels = self.shape[1]
        random = partial(torch.rand, channels, generator=generator, device=device)
        return {
            "c": self._normal(generator, device, 0.5).requires_grad_(),
            "dy": self._normal(generator, device, 1.0),
            "gamma": 0.5 + random(),
            "beta": random() - 0.5,
            "fold": 0.5 + random(),
        }

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return results and gradients of plain operators in float64.

        Gradients are autograd's; that of rounding is 1 inside the range.
        """
        c = inputs["c"].detach().double().requires_grad_()
        y = F.batch_norm(
            c / inputs["fold"].double().view(1, -1, 1, 1), None, None, *self._affine(inputs, torch.float64)
        )
        y = F.relu(y)
        scale = y.detach().amax() / STEPS
        quantized = y + ((y / scale).round() * scale - y).detach()
        (dc,) = torch.autograd.grad(quantized, c, inputs["dy"].double())
        return quantized.detach().to(self.dtype), dc.to(self.dtype)

    def case(self, *, quick: bool = False) -> Case:
        """Return the case, whose baseline is torch.ao.

        torch.ao passes over the tensor ten times forward and twenty times backward.
        """
        elements = torch.Size(self.shape).numel()
        layout = ["channels_last"] if self.channels_last else []
        name = ["conv_bn", "tail", "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch."), *layout]
        makers: dict[str, Callable[[Inputs], Callable[[Inputs], Tensor]]]
        makers = {"float": _float_tail, "torch.ao v0": partial(_ao_tail, 0), "torch.ao v1": partial(_ao_tail, 1)}
        table = {
            "tritonq": Implementation(_tritonq_tail, distribution="tritonq", module="tritonq"),
            **{name: Implementation(partial(_differentiated, maker)) for name, maker in makers.items()},
        }
        for name_, maker in makers.items():
            build = partial(_differentiated, maker, compiled=True)
            table[f"torch.compile({name_})"] = Implementation(build, quick=False)
        return Case(
            name="/".join([*name, "forward+backward"]),
            family="conv_bn",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=table,
            baseline="torch.ao v1",
            bytes_moved=_TAIL_PASSES * elements * self.dtype.itemsize,
            operations=_TAIL_OPERATIONS * elements,
            tolerance=_TAIL,
            devices=self.devices,
            quick=quick,
        )

    def _affine(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, bool, float, float]:
        return inputs["gamma"].to(dtype), inputs["beta"].to(dtype), True, _MOMENTUM, _EPS

    def _normal(self, generator: torch.Generator, device: torch.device, mean: float) -> Tensor:
        values = (torch.randn(self.shape, generator=generator, device=device) + mean).to(self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values


def _differentiated(
    maker: Callable[[Inputs], Callable[[Inputs], Tensor]], inputs: Inputs, *, compiled: bool = False
) -> Step:
    forward = maker(inputs)
    forward = torch.compile(forward, dynamic=False) if compiled else forward

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        y = forward(inputs)
        return y, *torch.autograd.grad(y, inputs["c"], inputs["dy"])

    return step


def _batch_norm(inputs: Inputs) -> Callable[[Tensor, Inputs], Tensor]:
    running_mean, running_var = torch.zeros_like(inputs["gamma"]), torch.ones_like(inputs["gamma"])

    def normalize(c: Tensor, inputs: Inputs) -> Tensor:
        return F.batch_norm(c, running_mean, running_var, inputs["gamma"], inputs["beta"], True, _MOMENTUM, _EPS)

    return normalize


def _float_tail(inputs: Inputs) -> Callable[[Inputs], Tensor]:
    """Return a function that computes what follows the convolution in float training.

    It does not divide by the fold, which is a part of quantization and cancels up to eps.
    """
    normalize = _batch_norm(inputs)
    return lambda inputs: F.relu(normalize(inputs["c"], inputs))


def _ao_tail(version: int, inputs: Inputs) -> Callable[[Inputs], Tensor]:
    """Return a function that computes what follows the convolution in torch.ao's ConvBnReLU2d, rounding included."""
    quantize = torch_ao_activation(version, inputs["c"].device)
    normalize = _batch_norm(inputs)
    return lambda inputs: quantize(F.relu(normalize(inputs["c"] / inputs["fold"].view(1, -1, 1, 1), inputs)))


def _tritonq_tail(inputs: Inputs) -> Step:
    from tritonq.backend import implementation
    from tritonq.reference.conv_bn import BatchNormState

    running_mean, running_var = torch.zeros_like(inputs["gamma"]), torch.ones_like(inputs["gamma"])
    norm = BatchNormState(running_mean, running_var, _MOMENTUM, _EPS)
    quantizer = activation_state(inputs["c"].device)
    tail = implementation("conv_bn", inputs["c"])

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        c, vectors = inputs["c"].detach(), (inputs["fold"], inputs["gamma"], inputs["beta"], None)
        y, normalization, qparams = tail.forward(c, *vectors, norm, *quantizer, math.inf)
        return y, tail.backward(inputs["dy"], c, normalization, qparams, math.inf)[0]

    return step


@dataclass(frozen=True)
class Layer:
    """Conv, BatchNorm and ReLU as a module in training; a step returns the output and the weight's gradient."""

    batch: int
    channels: int
    size: int
    kernel: int
    groups: int
    channels_last: bool
    autocast: torch.dtype | None
    devices: tuple[str, ...]

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``x`` and ``dy`` (batch, channels, size, size), normal."""
        shape = (self.batch, self.channels, self.size, self.size)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        dtype = self.autocast or torch.float32
        made = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
        x, dy = (tensor.contiguous(memory_format=layout) for tensor in made)
        return {"x": x.requires_grad_(), "dy": dy}

    def parts(self) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
        """Return float modules with the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            conv = nn.Conv2d(
                self.channels, self.channels, self.kernel, padding=self.kernel // 2, groups=self.groups, bias=False
            )
        return conv, nn.BatchNorm2d(self.channels), nn.ReLU()

    def case(self) -> Case:
        """Return the case. No least traffic is given, since a convolution bounds it; memory is counted instead."""
        kind = f"{self.kernel}x{self.kernel}" + (" depthwise" if self.groups > 1 else "")
        dtype = "float32" if self.autocast is None else f"amp-{str(self.autocast).removeprefix('torch.')}"
        parts = ["conv_bn", f"layer {kind}", f"{self.batch}x{self.channels}x{self.size}x{self.size}", dtype]
        parts += ["channels_last"] if self.channels_last else []
        makers: dict[str, Callable[[], nn.Module]]
        makers = {
            "float": self._float,
            "torch.ao v0": partial(self._torch_ao, 0),
            "torch.ao v1": partial(self._torch_ao, 1),
        }
        table = {name: Implementation(partial(_layer_step, self, make)) for name, make in makers.items()}
        ours = partial(_layer_step, self, self._tritonq)
        table["tritonq"] = Implementation(ours, distribution="tritonq", module="tritonq")
        return Case(
            name="/".join([*parts, "forward+backward"]),
            family="conv_bn",
            make_inputs=self.make_inputs,
            reference=lambda inputs: self._run(self._float().train(), inputs),
            implementations=table,
            baseline="float",
            bytes_moved=0,
            operations=0,
            tolerance=_LAYER,
            devices=self.devices,
            memory=partial(_memory, self),
        )

    def _float(self) -> nn.Module:
        return nn.Sequential(*self.parts())

    def _torch_ao(self, version: int) -> nn.Module:
        return torch_ao_layer(self.parts(), version)

    def _tritonq(self) -> nn.Module:
        return tritonq_layer(self.parts())

    def _run(self, module: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
        module.to(inputs["x"].device)
        with torch.autocast(inputs["x"].device.type, dtype=self.autocast, enabled=self.autocast is not None):
            y = module(inputs["x"])
        weight = next(parameter for parameter in module.parameters() if parameter.dim() == 4)
        gradients = torch.autograd.grad(y, (inputs["x"], weight), inputs["dy"].to(y.dtype))
        return y.float(), *gradients


def _layer_step(layer: Layer, make: Callable[[], nn.Module], inputs: Inputs) -> Step:
    return LayerStep(layer, make().to(inputs["x"].device).train())


@dataclass(frozen=True)
class LayerStep:
    """A training step of one layer that exposes its module, so that memory can be counted."""

    layer: Layer
    module: nn.Module

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return self.layer._run(self.module, inputs)


def _memory(layer: Layer, step: Step, inputs: Inputs) -> int:
    if inputs["x"].device.type == "cuda":
        return peak_bytes(step, inputs, inputs["x"].device)
    module = cast(LayerStep, step).module
    return saved_bytes(step, inputs, [*module.parameters(), *module.buffers()])


def cases() -> Iterator[Case]:
    """Yield tails of ResNet's first and last stage, and layers: 3×3, 1×1, depthwise."""
    cpu, cuda = ("cpu",), ("cuda",)
    for channels_last in (False, True):
        yield Tail((16, 64, 24, 24), torch.float32, channels_last, ("cpu", "cuda")).case(quick=True)
        yield Tail((32, 64, 56, 56), torch.float32, channels_last, cpu).case()
        for dtype in (torch.float32, torch.bfloat16):
            yield Tail((256, 64, 56, 56), dtype, channels_last, cuda).case()
            yield Tail((256, 512, 7, 7), dtype, channels_last, cuda).case()
        for kernel, groups in ((3, 1), (1, 1), (3, 64)):
            yield Layer(16, 64, 24, kernel, groups, channels_last, None, cpu).case()
            yield Layer(256, 64, 56, kernel, groups, channels_last, torch.bfloat16, cuda).case()
