"""Implementations of an operation whose result is quantized: tritonq's, torch.ao's, and float without quantization."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tritonq.perf.case import Implementation, Inputs, Step, Tolerance
from tritonq.perf.cases.quantizer_states import torch_ao_activation

Operator = Callable[..., Tensor]
Maker = Callable[[Inputs], Operator]

# Of an operation that is exact in float32.
ROUNDING = Tolerance(
    "the scale's last bit differs between float32 and float64, and with it ties",
    atol=1e-6,
    rtol=1e-5,
    fraction=3e-3,
)
_NEAR = Tolerance("float does not quantize: 8-bit noise", distance=0.02)


def implementations(
    operands: tuple[str, ...], ours: Maker, plain: Operator, *, compiled: bool = False
) -> dict[str, Implementation]:
    """Return tritonq's operator, the float operation alone, and that operation with torch.ao's quantizers.

    Args:
        operands: names of the inputs that get gradients.
        ours: makes the operator of tritonq.
        plain: the float operation.
        compiled: compile torch.ao's forms too, in runs that are not quick.
    """
    peers = {f"torch.ao v{version}": partial(_torch_ao, version, operands[0], plain) for version in (0, 1)}
    table = {
        "tritonq": Implementation(partial(_step, operands, ours), distribution="tritonq", module="tritonq"),
        **{name: Implementation(partial(_step, operands, maker)) for name, maker in peers.items()},
        "float": Implementation(partial(_step, operands, lambda _: plain), tolerance=_NEAR),
    }
    for name, maker in peers.items() if compiled else ():
        table[f"torch.compile({name})"] = Implementation(partial(_step, operands, maker, compiled=True), quick=False)
    return table


def _step(operands: tuple[str, ...], maker: Maker, inputs: Inputs, *, compiled: bool = False) -> Step:
    operator = maker(inputs)
    operator = torch.compile(operator, dynamic=False) if compiled else operator

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        given = tuple(inputs[name] for name in operands)
        y = operator(*given)
        return y, *torch.autograd.grad(y, given, inputs["dy"])

    return step


def _torch_ao(version: int, operand: str, plain: Operator, inputs: Inputs) -> Operator:
    quantize = torch_ao_activation(version, inputs[operand].device)
    return lambda *operands: quantize(plain(*operands))
