"""The weight of a Conv-BN layer in a training step.

It is folded, observed and fake quantized; the backward gives the gradients of weight and fold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from tritonq.grid import Grid, RangeStatistics
from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance
from tritonq.qparams import TORCH_EPS
from tritonq.quantized_type import QuantizedType

_QUANT_MIN, _QUANT_MAX = -128, 127

_SUMS = Tolerance(
    "the same codes; the fold's gradient is a sum of thousands of products, in another order", atol=1e-3, rtol=1e-4
)
_OTHER_RULE = Tolerance(
    "version 1 has its own rule for symmetric scales, so that every code may differ, and the largest value of a row is "
    "clipped, with its gradient, in one and not in the other: in rows of nine a distance of up to 0.4",
    distance=0.5,
)

# Fold, range, divide, round, clamp, times the scale; the mask again, two products and a sum.
_OPERATIONS = 15


@dataclass(frozen=True)
class Problem:
    """A weight (out, ...), symmetric per channel, whose range is that of the present step."""

    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the case, such as ``weight_fold/512x512x3x3/float32/forward+backward``."""
        return f"weight_fold/{'x'.join(map(str, self.shape))}/float32/forward+backward"

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``weight``, ``fold`` (out,) of either sign, and ``dy``, the gradient of the quantized weight."""
        fold = torch.rand(self.shape[0], generator=generator, device=device) + 0.5
        return {
            "weight": torch.randn(self.shape, generator=generator, device=device).requires_grad_(),
            "fold": (fold * torch.where(fold > 1, 1, -1)).requires_grad_(),
            "dy": torch.randn(self.shape, generator=generator, device=device),
        }

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the quantized weight, and the gradients of weight and fold by the straight-through estimator."""
        return quantized(inputs["weight"].detach(), inputs["fold"].detach(), inputs["dy"])

    def case(self, *, quick: bool) -> Case:
        """Return the case.

        Least traffic: forward one read, one write; backward two reads, one write.
        """
        elements = prod(self.shape)
        return Case(
            name=self.name,
            family="weight_fold",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations={
                "tritonq": Implementation(_tritonq, distribution="tritonq", module="tritonq", for_check=_as_values),
                "torch.ao v0": Implementation(partial(_torch_ao, 0)),
                "torch.ao v1": Implementation(partial(_torch_ao, 1), tolerance=_OTHER_RULE),
            },
            baseline="torch.ao v0",
            bytes_moved=5 * 4 * elements,
            operations=_OPERATIONS * elements,
            tolerance=_SUMS,
            quick=quick,
        )


def cases() -> Iterator[Case]:
    """Yield cases from a depthwise weight to the largest weight of ResNet-50."""
    yield Problem((512, 1, 3, 3)).case(quick=False)
    yield Problem((64, 64, 3, 3)).case(quick=True)
    yield Problem((512, 512, 3, 3)).case(quick=True)
    yield Problem((2048, 512, 1, 1)).case(quick=False)


def _tritonq(inputs: Inputs) -> Step:
    """Return a step that calls the operators of a Conv-BN layer, which convolves with codes and forms no values."""
    from tritonq.backend import implementation

    ops = implementation("weight", inputs["weight"])
    grid, statistics = per_channel_state(inputs["fold"])

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        weight, fold = inputs["weight"].detach(), inputs["fold"].detach()
        codes, unit, clips, frozen = ops.quantize_folded(weight, fold, grid, statistics)
        drows, dfold = ops.folded_backward(inputs["dy"] * column(unit, weight), weight, fold, unit, frozen, clips)
        return codes, unit, drows, dfold

    return step


def per_channel_state(vector: Tensor) -> tuple[Grid, RangeStatistics]:
    """Return a symmetric 8-bit grid per element of ``vector`` and a range that holds the present step's alone."""
    channels, device = len(vector), vector.device
    qtype, on = QuantizedType(_QUANT_MIN, _QUANT_MAX, axis=0), torch.ones(1, dtype=torch.uint8, device=device)
    grid = Grid(torch.ones(channels, device=device), None, qtype, on)
    statistics = RangeStatistics(
        torch.full((channels,), torch.inf, device=device),
        torch.full((channels,), -torch.inf, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
        qtype.granularity,
        on.clone(),
        averaging_constant=1.0,
        eps=TORCH_EPS,
    )
    return grid, statistics


def quantized(weight: Tensor, fold: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the quantized folded weight, and the gradients of weight and fold by the straight-through estimator."""
    fold, dims = column(fold, weight), tuple(range(1, weight.dim()))
    folded = weight * fold
    scale = (folded.abs().amax(dims, keepdim=True) / ((_QUANT_MAX - _QUANT_MIN) / 2)).clamp(min=1e-7)
    steps = torch.round(folded * (1.0 / scale))
    passed = dy * ((steps >= _QUANT_MIN) & (steps <= _QUANT_MAX))
    return steps.clamp(_QUANT_MIN, _QUANT_MAX) * scale, passed * fold, (passed * weight).sum(dims)


def _as_values(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    codes, unit, drows, dfold = outputs
    return codes * column(unit, codes), drows, dfold


def _torch_ao(version: int, inputs: Inputs) -> Step:
    """Return a step of weight times fold, and torch.ao's fake quantizer, differentiated by autograd."""
    from torch.ao.quantization import (
        FakeQuantize,
        FusedMovingAvgObsFakeQuantize,
        MovingAveragePerChannelMinMaxObserver,
    )

    kind: type[nn.Module] = FakeQuantize if version == 0 else FusedMovingAvgObsFakeQuantize
    quantizer = kind(
        MovingAveragePerChannelMinMaxObserver,
        quant_min=_QUANT_MIN,
        quant_max=_QUANT_MAX,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        averaging_constant=1.0,
    ).to(inputs["weight"].device)

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        y = quantizer(inputs["weight"] * column(inputs["fold"], inputs["weight"]))
        return y, *torch.autograd.grad(y, (inputs["weight"], inputs["fold"]), inputs["dy"])

    return step


def column(vector: Tensor, weight: Tensor) -> Tensor:
    """Return ``vector``, one element per out channel, in a shape that broadcasts against ``weight``."""
    return vector.view(-1, *[1] * (weight.dim() - 1))
