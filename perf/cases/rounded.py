"""Results of an operation without a kernel of its own, observed and rounded: a concatenation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance
from tritonq.perf.cases.quantizer_states import STEPS, activation_state, torch_ao_activation

_ROUNDING = Tolerance(
    "the scale's last bit differs between float32 and float64, and with it ties",
    atol=1e-6,
    rtol=1e-5,
    fraction=3e-3,
)
# Range, round, clamp, two products; the backward selects.
_OPERATIONS = 7


@dataclass(frozen=True)
class Concatenation:
    """``FQ(cat(a, b))`` along the channels with an affine 0..255 quantizer, forward and backward; values from 0 on."""

    shape: tuple[int, ...]

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``a`` and ``b`` of ``shape``, and ``dy``."""
        channels_twice = (self.shape[0], 2 * self.shape[1], *self.shape[2:])
        a, b = (torch.rand(self.shape, generator=generator, device=device) for _ in range(2))
        dy = torch.randn(channels_twice, generator=generator, device=device)
        return {"a": a.requires_grad_(), "b": b.requires_grad_(), "dy": dy}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return plain operators in float64: the range is that of this batch, and holds every value."""
        y = torch.cat([inputs["a"].detach(), inputs["b"].detach()], 1).double()
        scale = y.amax() / STEPS
        return ((y / scale).round() * scale).float(), *inputs["dy"].chunk(2, 1)

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """Forward copies once, reads twice and writes once; the backward reads one gradient and writes one."""
        makers = {"tritonq": _tritonq, "torch.ao v0": partial(_ao, 0), "torch.ao v1": partial(_ao, 1), "float": _float}
        table = {name: Implementation(partial(_step, maker)) for name, maker in makers.items()}
        table["tritonq"] = Implementation(partial(_step, _tritonq), distribution="tritonq", module="tritonq")
        near = Tolerance("float does not quantize: 8-bit noise", distance=0.02)
        table["float"] = Implementation(partial(_step, _float), tolerance=near)
        elements = 2 * prod(self.shape)
        return Case(
            name="/".join(["rounded", "concatenation", "x".join(map(str, self.shape)), "float32", "forward+backward"]),
            family="rounded",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=table,
            baseline="torch.ao v1",
            bytes_moved=7 * 4 * elements + elements // 4,
            operations=_OPERATIONS * elements,
            tolerance=_ROUNDING,
            devices=devices,
            quick=quick,
        )


Operator = Callable[[Tensor, Tensor], Tensor]


def _step(maker: Callable[[Inputs], Operator], inputs: Inputs) -> Step:
    join = maker(inputs)

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        y = join(inputs["a"], inputs["b"])
        return y, *torch.autograd.grad(y, (inputs["a"], inputs["b"]), inputs["dy"])

    return step


def _tritonq(inputs: Inputs) -> Operator:
    from tritonq.functional.residual import rounded_result

    state = activation_state(inputs["a"].device)
    return lambda a, b: rounded_result(torch.cat([a, b], 1), *state, None)


def _ao(version: int, inputs: Inputs) -> Operator:
    quantize = torch_ao_activation(version, inputs["a"].device)
    return lambda a, b: quantize(torch.cat([a, b], 1))


def _float(inputs: Inputs) -> Operator:
    return lambda a, b: torch.cat([a, b], 1)


def cases() -> Iterator[Case]:
    """Concatenations of a YOLO neck and of a U-Net."""
    for shape in ((16, 64, 24, 24), (32, 64, 56, 56)):
        yield Concatenation(shape).case(quick=False, devices=("cpu", "cuda"))
