"""Recognise recorded calls that are functions of one tensor, such as SiLU: modules, functions and methods.

The private functions read the arguments of one torch function each, and have its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tritonq.nn.functions import function_of
from tritonq.prepare.decide.clips import limits_range
from tritonq.prepare.decide.read_call import read_call
from tritonq.prepare.record.dataflow import Call, Ref
from tritonq.reference.functions import Function


def function_of_call(call: Call, shape: tuple[int, ...] = (), has_fixed_arguments: bool = True) -> Function | None:
    """Return the ``Function`` that a call computes; None if it computes something else.

    Args:
        call: any recorded call.
        shape: not used; the readers of all operations of one tensor have this parameter.
        has_fixed_arguments: not used: slopes and the like are taken for constants in every forward.
    """
    if call.kind == "module":
        return function_of(call.target)
    return read_call(call, _READERS)


def joins_layer(call: Call, fuses_functions: bool) -> bool:
    """Whether an engine computes a call together with the layer before it, without rounding in between.

    True for ReLU, ReLU6, clamp and other clips to constant bounds. True for functions of one tensor, such as SiLU, and
    for ``nn.PReLU`` if ``fuses_functions``. False for all other calls.

    Args:
        call: any recorded call.
        fuses_functions: whether the engine computes functions such as SiLU together with the layer before them.
    """
    if limits_range(call):
        return True
    return fuses_functions and (function_of_call(call) is not None or prelu_of_call(call) is not None)


def prelu_of_call(call: Call, shape: tuple[int, ...] = (), has_fixed_arguments: bool = True) -> type[nn.PReLU] | None:
    """Return ``nn.PReLU`` if a call is one of such a module (no subclass), else None.

    ``shape`` and ``has_fixed_arguments`` are not used.
    """
    return nn.PReLU if type(call.target) is nn.PReLU else None


def _plain(name: str) -> Callable[..., Function]:
    """Return a function that reads the arguments of a torch function without parameters, such as sigmoid."""

    def read(input: Ref, inplace: bool = False) -> Function:
        return Function(name)

    return read


def _gelu(input: Ref, approximate: str = "none") -> Function:
    return Function("tanh_gelu" if approximate == "tanh" else "gelu")


def _leaky_relu(input: Ref, negative_slope: Any = 0.01, inplace: bool = False) -> Function:
    return Function("leaky_relu", (float(negative_slope),))


def _elu(input: Ref, alpha: Any = 1.0, inplace: bool = False) -> Function:
    return Function("elu", (float(alpha),))


def _softplus(input: Ref, beta: Any = 1.0, threshold: Any = 20.0) -> Function:
    return Function("softplus", (float(beta), float(threshold)))


_NAMES = ("sigmoid", "tanh", "silu", "hardsigmoid", "hardswish", "mish")
_READERS: Mapping[str, Callable[..., Function]] = {
    **{name: _plain(name) for name in _NAMES},
    "expit": _plain("sigmoid"),
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "softplus": _softplus,
}
