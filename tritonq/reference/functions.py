"""Functions of one tensor between two grids: SiLU, Hardswish, sigmoid and the like, as tables of codes.

A quantized tensor has few values, so that such a function is a table: a code of the result for each code of the input.
Engines compute the function in float32, and its last bit decides ties. So there is one definition, in ONNX Runtime's
order of operations: ``code = round(f(fl((code_in - z_in) · s_in)) / s_out) + z_out``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.arithmetic import as_dtype, round_steps_
from tritonq.grid import Grid, RangeStatistics
from tritonq.reference.activation import observe, quantize_, straight_through_
from tritonq.reference.operator import CopyOf, Like, operator
from tritonq.reference.ranges import OBSERVED, snapshot
from tritonq.reference.scratch import borrow_or_new

# Wider grids have no table.
_MOST_BITS = 16

_aten = torch.ops.aten


# Between the names of functions that follow each other.
_THEN = " > "


@dataclass(frozen=True)
class Function:
    """A function of one tensor, element by element; or a chain, each function applied to the result of the one before.

    Attributes:
        name: a key of :data:`DEFINITIONS`, or several for a chain, from first to last: ``"plus > clip"``.
        arguments: the numbers that the function takes beside the tensor, in torch's order; those of a chain one after
            the other.

    Examples:
        >>> Function("leaky_relu", (0.1,))(torch.tensor([-2.0, 3.0]))
        tensor([-0.2000,  3.0000])
        >>> Function("plus", (3.0,)).then(Function("clip", (0.0, 6.0)))(torch.tensor([-4.0, 1.0]))
        tensor([0., 4.])
    """

    name: str
    arguments: tuple[float, ...] = ()

    @property
    def steps(self) -> tuple[Function, ...]:
        """The functions of the chain, from first to last; a single function is a chain of one."""
        if _THEN not in self.name:
            return (self,)
        found, rest = [], self.arguments
        for name in self.name.split(_THEN):
            count = DEFINITIONS[name].arguments
            found.append(Function(name, rest[:count]))
            rest = rest[count:]
        return tuple(found)

    def then(self, other: Function) -> Function:
        """Return the chain that applies ``other`` to the result of this function."""
        return Function(f"{self.name}{_THEN}{other.name}", (*self.arguments, *other.arguments))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the function of a float tensor, as torch computes it; differentiable."""
        for step in self.steps:
            x = DEFINITIONS[step.name].torch(x, *step.arguments)
        return x

    def deployed(self, x: Tensor) -> Tensor:
        """Return the function of a float32 tensor ``x`` in the order of operations of engines; without gradient.

        What an engine approximates (exponentials, error functions) is computed in float64 and rounded to float32.
        """
        for step in self.steps:
            x = DEFINITIONS[step.name].deployed(x, *step.arguments)
        return x


@dataclass(frozen=True)
class Definition:
    """How a function is computed in training and by engines.

    Attributes:
        torch: called with the tensor and the numbers, one argument each; what training computes, differentiable.
        deployed: called likewise with a float32 tensor; computes in the order of operations of engines.
        backward: called with the gradient of the result, the input, the result, and the numbers; returns the input's
            gradient.
        arguments: how many numbers the function takes beside the tensor.
    """

    torch: Callable[..., Tensor]
    deployed: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    arguments: int = 0


def _in_float64(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that computes ``function`` in float64 and rounds the result to float32."""

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


def _clip(x: Tensor, low: float, high: float) -> Tensor:
    if low == -math.inf:
        return x.clamp_max(high)
    return x.clamp_min(low) if high == math.inf else x.clamp(low, high)


def _plus(x: Tensor, number: float) -> Tensor:
    return x + number


def _times(x: Tensor, number: float) -> Tensor:
    return x * number


def _over(x: Tensor, number: float) -> Tensor:
    # In float64: on GPUs torch multiplies by the reciprocal.
    return (x.double() / float(torch.tensor(number))).float()


def _ratio(x: Tensor, number: float) -> Tensor:
    return x.reciprocal() * number


def _gelu_backward(approximate: str) -> Callable[..., Tensor]:
    return lambda dy, x, y: _aten.gelu_backward(dy, x, approximate=approximate)


DEFINITIONS: Mapping[str, Definition] = {
    "sigmoid": Definition(torch.sigmoid, _sigmoid, lambda dy, x, y: _aten.sigmoid_backward(dy, y)),
    "tanh": Definition(torch.tanh, _tanh, lambda dy, x, y: _aten.tanh_backward(dy, y)),
    "silu": Definition(F.silu, lambda x: x * _sigmoid(x), lambda dy, x, y: _aten.silu_backward(dy, x)),
    "hardsigmoid": Definition(F.hardsigmoid, _hardsigmoid, lambda dy, x, y: _aten.hardsigmoid_backward(dy, x)),
    "hardswish": Definition(
        F.hardswish, lambda x: x * _hardsigmoid(x), lambda dy, x, y: _aten.hardswish_backward(dy, x)
    ),
    "gelu": Definition(F.gelu, _in_float64(F.gelu), _gelu_backward("none")),
    "tanh_gelu": Definition(_tanh_gelu, _in_float64(_tanh_gelu), _gelu_backward("tanh")),
    "leaky_relu": Definition(
        F.leaky_relu, _leaky_relu, lambda dy, x, y, slope: _aten.leaky_relu_backward(dy, x, slope, False), arguments=1
    ),
    "elu": Definition(
        F.elu, _in_float64(F.elu), lambda dy, x, y, alpha: _aten.elu_backward(dy, alpha, 1, 1, False, x), arguments=1
    ),
    "softplus": Definition(
        F.softplus, _softplus, lambda dy, x, y, *numbers: _aten.softplus_backward(dy, x, *numbers), arguments=2
    ),
    "mish": Definition(F.mish, lambda x: x * _tanh(_softplus(x)), lambda dy, x, y: _aten.mish_backward(dy, x)),
    "clip": Definition(
        _clip, _clip, lambda dy, x, y, low, high: torch.where((x >= low) & (x <= high), dy, 0), arguments=2
    ),
    # Arithmetic with a number: x + n, x · n, x / n, n - x, n / x.
    "plus": Definition(_plus, _plus, lambda dy, x, y, number: dy, arguments=1),
    "times": Definition(_times, _times, lambda dy, x, y, number: dy * number, arguments=1),
    "over": Definition(lambda x, number: x / number, _over, lambda dy, x, y, number: dy / number, arguments=1),
    "from": Definition(torch.rsub, torch.rsub, lambda dy, x, y, number: -dy, arguments=1),
    "ratio": Definition(_ratio, _ratio, lambda dy, x, y, number: -(dy * number) * x.reciprocal().square(), arguments=1),
    "square": Definition(torch.square, torch.square, lambda dy, x, y: dy * (2 * x)),
    "abs": Definition(torch.abs, torch.abs, lambda dy, x, y: dy * x.sgn()),
}


class RoundedFunction(NamedTuple):
    """The result of :func:`forward`.

    Attributes:
        y: ``FQ(f(x))``, in the dtype of ``x``; f(x) while the grid is switched off or its range has no data.
        grid: a snapshot: a copy of the grid as this step used it, for the backward.
    """

    y: Tensor
    grid: Grid


_RESULT: Any = Like("x")
_SNAPSHOT: Any = CopyOf("grid")
_GRADIENT: Any = Like("x", "dy")


@operator(returns=RoundedFunction(_RESULT, _SNAPSHOT), mutates=OBSERVED, visible=True, made_again=True)
def forward(x: Tensor, function: Function, grid: Grid, statistics: RangeStatistics | None) -> RoundedFunction:
    """Return ``FQ(f(x))``, rounded once to ``x``'s dtype, and a snapshot of the grid; observes f(x).

    Args:
        x: any shape and float dtype.
        function: f, as torch computes it; not a chain.
        grid: per tensor; if f(x) is observed, its scale and zero point are updated in place before values are rounded.
        statistics: the running range of the grid, which f(x) updates in place; None observes nothing.
    """
    y = function(as_dtype(x, torch.promote_types(x.dtype, torch.float32)))
    frozen = snapshot(grid, observe(y, grid, statistics, None).statistics)
    return RoundedFunction(as_dtype(quantize_(y, frozen, None), x.dtype), frozen)


@operator(returns=_GRADIENT, visible=True)
def backward(
    dy: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, function: Function, grid: Grid
) -> Tensor:
    """Return the gradient of :func:`forward`'s input: ``f'(x) · dy`` where the clip does not block it, else 0.

    The clip passes values whose rounded, unclipped code is a code; if the grid is switched off, all. f(x) is computed
    again.

    Args:
        dy: gradient of the result, in the dtype of the input, which the returned gradient has.
        x: the input, or with ``scale`` its codes: the input is ``(x - shift) · scale``, rounded to the dtype of ``dy``.
        scale: one float32; None: ``x`` is the input.
        shift: a tensor of one number; None for zero.
        function: f, not a chain.
        grid: the snapshot of the forward.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    if scale is not None:
        x = as_dtype((x.to(wide) if shift is None else x.to(wide) - shift) * scale, dy.dtype)
    x = as_dtype(x, wide)
    y = function(x)
    # Into other memory: some gradients are computed from the result.
    g = straight_through_(as_dtype(dy, wide), y, grid, None, out=borrow_or_new("local", y))
    return as_dtype(DEFINITIONS[function.name].backward(g, x, y, *function.arguments), dy.dtype)


def function_to_data(function: Function) -> dict[str, Any]:
    """Return a function as plain data: ``{"name": "leaky_relu", "arguments": [0.1]}``.

    :func:`function_from_data` reads it.
    """
    return {"name": function.name, "arguments": list(function.arguments)}


def function_from_data(data: Mapping[str, Any]) -> Function:
    """Return the function that :func:`function_to_data` described.

    Raises:
        KeyError: ``data`` names an unknown function, or lacks ``name`` or ``arguments``.
    """
    unknown = [name for name in data["name"].split(_THEN) if name not in DEFINITIONS]
    if unknown:
        raise KeyError(f"unknown function {unknown[0]!r}")
    return Function(data["name"], tuple(data["arguments"]))


def onto_output(y: Tensor, output: Grid) -> Tensor:
    """Return ``round(y / s) · s`` with the output's scale s, float32, as ONNX's QuantizeLinear divides; not clipped.

    The output's quantizer clips the result. ``y`` is float32 and not changed; ``output`` is per tensor, and its type
    says how ties are rounded.
    """
    return round_steps_(y / output.scale, output.qtype.rounding).mul_(output.scale)


def function_table(function: Function, source: Grid, output: Grid) -> Tensor:
    """Return ``round(f((code - z) · s_in) / s_out) · s_out`` for every code of ``source``, from the smallest up.

    The result is a float32 vector of values (not codes) on the output's grid, not clipped. f is computed as
    :meth:`Function.deployed` does.

    Args:
        function: f and its numbers.
        source: grid of the input, per tensor; without zero point, z is 0.
        output: grid of the quantizer behind the function, per tensor.
    """
    codes = torch.arange(source.qtype.quant_min, source.qtype.quant_max + 1, device=source.scale.device)
    if source.zero_point is not None:
        codes = codes - source.zero_point
    return onto_output(function.deployed(codes.float() * source.scale), output)


def look_up(x: Tensor, function: Function, source: Grid, output: Grid) -> Tensor:
    """Return ``round(f(x) / s_out) · s_out`` for values on the grid ``source``. NaN stays NaN.

    A grid of at most 16 bits takes a table. f is computed in float32, in the order of operations of engines. With a
    table, values beyond the ends of ``source`` count as its ends.

    Args:
        x: float tensor of values ``(code - zero_point) * scale`` of ``source``.
        function: f and its numbers.
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
