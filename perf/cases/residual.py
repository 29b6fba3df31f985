"""The residual join: addition, ReLU, observation and fake quantization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance
from tritonq.perf.cases.quantizer_states import STEPS, activation_state, torch_ao_activation

_ROUNDING = Tolerance(
    "the scale's last bit differs between float32 and float64, and with it ties",
    atol=1e-6,
    rtol=1e-5,
    fraction=3e-3,
)
# bfloat16 rounds the sum of the eager forms to 8 bits before the range is taken.
_ROUNDING_BF16 = Tolerance("eager forms round the sum to bfloat16 before they quantize it", distance=0.02)

# Add, ReLU, range, round, clamp, two products; the backward selects.
_OPERATIONS = 9


@dataclass(frozen=True)
class Join:
    """``FQ(relu(a + b))`` with an affine 0..255 quantizer, forward and backward."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``a``, ``b``, ``dy``, normal."""
        a, b, dy = (self._normal(generator, device) for _ in range(3))
        return {"a": a.requires_grad_(), "b": b.requires_grad_(), "dy": dy}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return plain operators in float64: the range is that of this batch, and holds every value."""
        total = inputs["a"].detach().double() + inputs["b"].detach().double()
        y = total.clamp(min=0)
        scale = y.amax() / STEPS
        dy = torch.where(total > 0, inputs["dy"], torch.zeros_like(inputs["dy"]))
        return ((y / scale).round() * scale).to(self.dtype), dy, dy

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """Forward reads both inputs twice and writes once; the backward reads one gradient and writes one."""
        parts = ["residual", "join", "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        parts += ["channels_last"] if self.channels_last else []
        makers = {"tritonq": _tritonq, "torch.ao v0": partial(_ao, 0), "torch.ao v1": partial(_ao, 1), "float": _float}
        table = {name: Implementation(partial(_step, maker)) for name, maker in makers.items()}
        table["tritonq"] = Implementation(partial(_step, _tritonq), distribution="tritonq", module="tritonq")
        near = Tolerance("float does not quantize: 8-bit noise", distance=0.02)
        table["float"] = Implementation(partial(_step, _float), tolerance=near)
        for name in ("torch.ao v0", "torch.ao v1"):
            table[f"torch.compile({name})"] = Implementation(partial(_step, makers[name], compiled=True), quick=False)
        elements = prod(self.shape)
        return Case(
            name="/".join([*parts, "forward+backward"]),
            family="residual",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=table,
            baseline="torch.ao v1",
            # One bit per element is written and read besides.
            bytes_moved=7 * elements * self.dtype.itemsize + elements // 4,
            operations=_OPERATIONS * elements,
            tolerance=_ROUNDING if self.dtype == torch.float32 else _ROUNDING_BF16,
            devices=devices,
            quick=quick,
        )

    def _normal(self, generator: torch.Generator, device: torch.device) -> Tensor:
        values = torch.randn(self.shape, generator=generator, device=device).to(self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values


Operator = Callable[[Tensor, Tensor], Tensor]


def _step(maker: Callable[[Inputs], Operator], inputs: Inputs, *, compiled: bool = False) -> Step:
    join = maker(inputs)
    join = torch.compile(join, dynamic=False) if compiled else join

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        y = join(inputs["a"], inputs["b"])
        return y, *torch.autograd.grad(y, (inputs["a"], inputs["b"]), inputs["dy"])

    return step


def _tritonq(inputs: Inputs) -> Operator:
    from tritonq.functional.residual import residual_join

    state = activation_state(inputs["a"].device)
    return lambda a, b: residual_join(a, b, *state, math.inf)


def _ao(version: int, inputs: Inputs) -> Operator:
    quantize = torch_ao_activation(version, inputs["a"].device)
    return lambda a, b: quantize(F.relu(a + b))


def _float(inputs: Inputs) -> Operator:
    return lambda a, b: F.relu(a + b)


def cases() -> Iterator[Case]:
    """Yield joins of ResNet's stages, in both layouts."""
    for channels_last in (False, True):
        for shape in ((16, 64, 24, 24), (32, 64, 56, 56)):
            yield Join(shape, torch.float32, channels_last).case(quick=False, devices=("cpu", "cuda"))
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((256, 64, 56, 56), (256, 2048, 7, 7)):
                yield Join(shape, dtype, channels_last).case(quick=False, devices=("cuda",))
