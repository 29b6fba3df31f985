"""Functions of one tensor between two grids: SiLU, Hardswish, sigmoid and the like, as tables of codes.

A quantized tensor has few values, so that such a function is a table: a code of the result for each code of the input.
An engine computes it in float32, and the last bit decides at a tie. So there is one definition, in the order of
operations in which ONNX Runtime computes it: ``code = round(f(fl((code_in - z_in) · s_in)) / s_out) + z_out``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.grid import Grid
from tritonq.qparams import round_half_away

# Wider grids have no table.
_MOST_BITS = 16


@dataclass(frozen=True)
class Function:
    """A function of one tensor, element by element.

    Attributes:
        name: a key of :data:`DEFINITIONS`.
        arguments: numbers that it takes beside the tensor, in torch's order.

    Examples:
        >>> Function("leaky_relu", (0.1,))(torch.tensor([-2.0, 3.0]))
        tensor([-0.2000,  3.0000])
    """

    name: str
    arguments: tuple[float, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the function of a float tensor, as torch computes it; differentiable."""
        return DEFINITIONS[self.name].torch(x, *self.arguments)

    def deployed(self, x: Tensor) -> Tensor:
        """Return the function of a float32 tensor, as engines compute it; without gradient.

        What an engine approximates (exponentials, error functions) is computed in float64 and rounded to float32.
        """
        return DEFINITIONS[self.name].deployed(x, *self.arguments)


@dataclass(frozen=True)
class Definition:
    """How a function is computed.

    Attributes:
        torch: in training, and where a grid is unknown.
        deployed: in float32, in the engine's order of operations.
    """

    torch: Callable[..., Tensor]
    deployed: Callable[..., Tensor]


def _in_float64(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute in float64 and round once."""

    def compute(x: Tensor, *arguments: float) -> Tensor:
        return function(x.double(), *arguments).float()

    return compute


_sigmoid, _tanh, _softplus = _in_float64(torch.sigmoid), _in_float64(torch.tanh), _in_float64(F.softplus)


def _hardsigmoid(x: Tensor) -> Tensor:
    return (x * (1 / 6) + 0.5).clamp(0, 1)


def _leaky_relu(x: Tensor, slope: float) -> Tensor:
    return torch.where(x >= 0, x, x * slope)


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


DEFINITIONS: Mapping[str, Definition] = {
    "sigmoid": Definition(torch.sigmoid, _sigmoid),
    "tanh": Definition(torch.tanh, _tanh),
    "silu": Definition(F.silu, lambda x: x * _sigmoid(x)),
    "hardsigmoid": Definition(F.hardsigmoid, _hardsigmoid),
    "hardswish": Definition(F.hardswish, lambda x: x * _hardsigmoid(x)),
    "gelu": Definition(F.gelu, _in_float64(F.gelu)),
    "tanh_gelu": Definition(_tanh_gelu, _in_float64(_tanh_gelu)),
    "leaky_relu": Definition(F.leaky_relu, _leaky_relu),
    "elu": Definition(F.elu, _in_float64(F.elu)),
    "softplus": Definition(F.softplus, _softplus),
    "mish": Definition(F.mish, lambda x: x * _tanh(_softplus(x))),
}


def function_to_data(function: Function) -> dict[str, Any]:
    """Return a function as plain data."""
    return {"name": function.name, "arguments": list(function.arguments)}


def function_from_data(data: Mapping[str, Any]) -> Function:
    """Return the function that :func:`function_to_data` described.

    Raises:
        KeyError: data that describes none.
    """
    if data["name"] not in DEFINITIONS:
        raise KeyError(f"unknown function {data['name']!r}")
    return Function(data["name"], tuple(data["arguments"]))


def onto_output(y: Tensor, output: Grid) -> Tensor:
    """Return float32 values rounded to a grid of one scale, by division as ONNX's QuantizeLinear, before clipping."""
    steps = y / output.scale
    rounded = steps.round_() if output.qtype.rounding == "half_even" else round_half_away(steps)
    return rounded.mul_(output.scale)


def function_table(function: Function, source: Grid, output: Grid) -> Tensor:
    """Return the result for every code of ``source``, from the smallest on: float32 on the output's grid, not clipped.

    Args:
        function: the function.
        source: grid of the input, per tensor.
        output: grid of the quantizer behind the function, per tensor.
    """
    codes = torch.arange(source.qtype.quant_min, source.qtype.quant_max + 1, device=source.scale.device)
    if source.zero_point is not None:
        codes = codes - source.zero_point
    return onto_output(function.deployed(codes.float() * source.scale), output)


def look_up(x: Tensor, function: Function, source: Grid, output: Grid) -> Tensor:
    """Return the function of values on a grid, by its table where the grid has at most 16 bits; NaN stays NaN.

    Args:
        x: float tensor of values ``(code - zero_point) * scale`` of ``source``.
        function: the function.
        source: grid of the input, per tensor.
        output: grid of the quantizer behind the function, per tensor.

    Returns:
        float32 on the output's grid, before clipping to its codes.
    """
    steps = (x.float() / source.scale).round_()
    if source.qtype.bits > _MOST_BITS:
        return onto_output(function.deployed(steps.mul_(source.scale)), output)
    table = function_table(function, source, output)
    if source.zero_point is not None:
        steps.add_(source.zero_point)
    count = len(table)
    index = steps.sub_(source.qtype.quant_min).clamp_(0, count - 1).nan_to_num_(nan=count).to(torch.int32)
    return torch.cat([table, table.new_full((1,), math.nan)])[index]
