"""All weights of a model, quantized by one launch at the start of a step or one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance

_QUANT_MIN, _QUANT_MAX = -128, 127
# Fold, range, divide, round, clamp.
_OPERATIONS = 8


@dataclass(frozen=True)
class Problem:
    """Weights (out, ...), symmetric per channel, whose ranges are found in this step."""

    name: str
    shapes: tuple[tuple[int, ...], ...]

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``weight0``, ``weight1``, …, and the ``fold`` of all their out channels."""
        inputs = {
            f"weight{i}": torch.randn(shape, generator=generator, device=device) for i, shape in enumerate(self.shapes)
        }
        channels = sum(shape[0] for shape in self.shapes)
        return {**inputs, "fold": torch.rand(channels, generator=generator, device=device) + 0.5}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the codes of each weight."""
        codes = []
        for weight, fold in zip(self.weights(inputs), self.folds(inputs), strict=True):
            folded = weight * fold.view(-1, *[1] * (weight.dim() - 1))
            largest = folded.abs().amax(tuple(range(1, weight.dim())), keepdim=True)
            scale = (largest / ((_QUANT_MAX - _QUANT_MIN) / 2)).clamp(min=1e-7)
            codes.append(torch.round(folded * (1.0 / scale)).clamp(_QUANT_MIN, _QUANT_MAX))
        return tuple(codes)

    def weights(self, inputs: Inputs) -> list[Tensor]:
        """Return the weights among the inputs."""
        return [inputs[f"weight{i}"] for i in range(len(self.shapes))]

    def folds(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the fold (one factor per out channel, γ/σ of a BatchNorm) of each weight."""
        return torch.split(inputs["fold"], [shape[0] for shape in self.shapes])

    def case(self, *, quick: bool) -> Case:
        """Return the case; least traffic: each weight is read once and written once."""
        elements = sum(map(prod, self.shapes))
        return Case(
            name=f"weights_together/{self.name}/float32",
            family="weights_together",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations={
                "tritonq": Implementation(self._together, distribution="tritonq", module="tritonq"),
                "one by one": Implementation(self._one_by_one, distribution="tritonq", module="tritonq"),
            },
            baseline="one by one",
            bytes_moved=2 * 4 * elements,
            operations=_OPERATIONS * elements,
            tolerance=Tolerance("the same codes"),
            quick=quick,
        )

    def _together(self, inputs: Inputs) -> Step:
        from tritonq.backend import implementation

        operators, grids, ranges = implementation("weights_together", inputs["fold"]), *_quantizers(self, inputs)

        def step(inputs: Inputs) -> tuple[Tensor, ...]:
            results = operators.quantize_all(self.weights(inputs), inputs["fold"], grids, ranges)
            return tuple(codes for codes, *_ in results)

        return step

    def _one_by_one(self, inputs: Inputs) -> Step:
        from tritonq.backend import implementation

        operators, quantizers = (
            implementation("weight", inputs["fold"]),
            list(zip(*_quantizers(self, inputs), strict=True)),
        )

        def step(inputs: Inputs) -> tuple[Tensor, ...]:
            weights = zip(self.weights(inputs), self.folds(inputs), quantizers, strict=True)
            return tuple(operators.quantize_folded(weight, fold, *quantizer)[0] for weight, fold, quantizer in weights)

        return step


def cases() -> Iterator[Case]:
    """Yield the convolutions of ResNet-18's four stages."""
    stages = tuple((channels, channels, 3, 3) for channels in (64, 128, 256, 512) for _ in range(4))
    yield Problem("resnet18", stages).case(quick=False)
    yield Problem("small", ((16, 16, 3, 3),) * 8).case(quick=True)


def _quantizers(problem: Problem, inputs: Inputs) -> tuple[list[object], list[object]]:
    from tritonq.grid import Grid, RangeStatistics
    from tritonq.qparams import TORCH_EPS
    from tritonq.quantized_type import QuantizedType

    qtype, device = QuantizedType(_QUANT_MIN, _QUANT_MAX, axis=0), inputs["fold"].device
    grids: list[object] = []
    ranges: list[object] = []
    for out, *_ in problem.shapes:
        switch = torch.ones(1, dtype=torch.uint8, device=device)
        grids.append(Grid(torch.ones(out, device=device), None, qtype, switch))
        low, high = torch.full((out,), torch.inf, device=device), torch.full((out,), -torch.inf, device=device)
        count = torch.zeros((), dtype=torch.int64, device=device)
        ranges.append(
            RangeStatistics(low, high, count, qtype.granularity, switch.clone(), averaging_constant=1.0, eps=TORCH_EPS)
        )
    return grids, ranges
