"""The weight of a Conv-BN layer in a training step: its BatchNorm's factor, range, codes, and the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance
from tritonq.perf.cases.weight import column, per_channel_state, quantized

_EPS = 1e-5
_CODES = Tolerance("the factor's last bit differs, and with it ties", atol=1e-4, rtol=1e-4, fraction=3e-3)
# Fold, range, divide, round, clamp, times the scale; the mask again, two products and a sum.
_OPERATIONS = 15


@dataclass(frozen=True)
class Problem:
    """A weight (out, ...), symmetric per channel, whose range is that of the present step."""

    shape: tuple[int, ...]

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``weight``, ``gamma`` and ``running_var`` (out,), and ``dy``, the gradient of the quantized weight."""
        gamma, running_var = (torch.rand(self.shape[0], generator=generator, device=device) + 0.5 for _ in range(2))
        weight, dy = (torch.randn(self.shape, generator=generator, device=device) for _ in range(2))
        return {"weight": weight, "gamma": gamma, "running_var": running_var, "dy": dy}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the quantized folded weight and the weight's gradient, by plain operators."""
        return _formula(inputs)

    def case(self, *, quick: bool, devices: tuple[str, ...] = ("cpu", "cuda")) -> Case:
        """Return the case.

        The least traffic is one read and one write forward, two reads and one write backward.
        """
        elements = prod(self.shape)
        tritonq = Implementation(_tritonq, distribution="tritonq", module="tritonq")
        return Case(
            name=f"batch_norm_weight/{'x'.join(map(str, self.shape))}/float32/forward+backward",
            family="batch_norm_weight",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations={"tritonq": tritonq, "plain operators": Implementation(lambda _: _formula)},
            baseline="plain operators",
            bytes_moved=5 * 4 * elements,
            operations=_OPERATIONS * elements,
            tolerance=_CODES,
            devices=devices,
            quick=quick,
        )


def cases() -> Iterator[Case]:
    """Yield weights from a depthwise one to the largest 3×3 of ResNet-50."""
    yield Problem((512, 1, 3, 3)).case(quick=False)
    yield Problem((64, 64, 3, 3)).case(quick=False)
    yield Problem((512, 512, 3, 3)).case(quick=False)


def _formula(inputs: Inputs) -> tuple[Tensor, ...]:
    fold = inputs["gamma"] * torch.rsqrt(inputs["running_var"] + _EPS)
    return quantized(inputs["weight"], fold, inputs["dy"])[:2]


def _tritonq(inputs: Inputs) -> Step:
    """Return a step that calls the operators of a Conv-BN layer; codes become values for the comparison."""
    from tritonq.backend import implementation

    ops = implementation("batch_norm_weight", inputs["weight"])
    grid, statistics = per_channel_state(inputs["gamma"])
    nothing = torch.zeros_like(inputs["gamma"])

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        weight, gamma, dtype = inputs["weight"], inputs["gamma"], torch.float32
        made = ops.quantize(weight, inputs["running_var"], gamma, _EPS, dtype, dtype, grid, statistics)
        unit = column(made.unit, weight)
        vectors = (gamma, made.fold, made.inverse_std, made.unit, nothing, nothing)
        drows, _ = ops.gradients(inputs["dy"] * unit, weight, *vectors, made.grid, made.clips)
        return made.codes * unit, drows

    return step
