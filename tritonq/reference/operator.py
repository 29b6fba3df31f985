"""A decorator for the functions of `tritonq.reference` that are operators, with what a traced graph must know of them.

An operator has one signature: the reference's. Its kernel launcher has the same parameters, and
`tritonq.functional.traced` makes its *traced form*, a custom operator for ``torch.compile``, from it. A traced operator
returns plain tensors, and says beforehand what they will look like: :class:`Like`, :class:`New`, :class:`CopyOf` and
:class:`Given` stand for one result each.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Like:
    """A result that looks like ``torch.empty_like(argument)``.

    Attributes:
        argument: name of a tensor parameter, or of a field of a parameter: ``"grid.scale"``.
        dtype: of the result; or the name of the parameter that gives it; or a function of the argument's dtype. None:
            the argument's dtype.
        prepare: called with the argument; the result looks like the tensor that it returns. None: like the argument.
    """

    argument: str
    dtype: torch.dtype | str | Callable[[torch.dtype], torch.dtype] | None = None
    prepare: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class New:
    """A contiguous result whose shape is computed.

    Attributes:
        shape: called with a dict of the operator's arguments; returns the shape.
        argument: name of a tensor parameter, which gives the device, and the dtype if ``dtype`` is None.
        dtype: of the result, or the name of the parameter that gives it.
        keeps_format: whether the result is channels last if the argument is.
    """

    shape: Callable[[dict[str, Any]], tuple[int, ...]]
    argument: str
    dtype: torch.dtype | str | None = None
    keeps_format: bool = False


@dataclass(frozen=True)
class CopyOf:
    """A result that is a copy of a grid argument as it is when the operator returns; None if the argument is None.

    Attributes:
        argument: name of the parameter.
        shape: called with a dict of the operator's arguments; returns one shape, which scale, zero point and switch
            all have. None: the grid's own shape, and one element for the switch.
    """

    argument: str
    shape: Callable[[dict[str, Any]], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Given:
    """A result that is an argument itself.

    Attributes:
        argument: name of the parameter.
    """

    argument: str


@dataclass(frozen=True)
class OperatorSpec:
    """The arguments with which :func:`operator` was called, kept as ``function.operator`` for tracing.

    Attributes:
        returns: the template of the result: leaves (:class:`Like` and others) nested as the result is.
        mutates: names of tensors that are updated in place.
        scratch: names of parameters that only give memory for results.
        has_kernel: whether there is a Triton kernel, too.
        overwrites: names of tensors that may be used as memory for results.
        visible: whether a compiler sees the tensor operations inside.
        made_again: whether a compiled backward computes results again instead of keeping them.
    """

    returns: Any
    mutates: tuple[str, ...]
    scratch: tuple[str, ...]
    has_kernel: bool
    overwrites: tuple[str, ...]
    visible: bool
    made_again: bool


def operator(
    returns: Any = None,
    mutates: tuple[str, ...] = (),
    scratch: tuple[str, ...] = (),
    has_kernel: bool = True,
    overwrites: tuple[str, ...] = (),
    visible: bool = False,
    made_again: bool = False,
) -> Callable[[_Function], _Function]:
    """Return a decorator that marks a function as an operator: it sets ``function.operator``.

    Args:
        returns: nested as the result, with :class:`Like`, :class:`New`, :class:`CopyOf` or :class:`Given` in place of
            each tensor or grid. Other values in it, such as True, are results of the traced form as they are. None:
            the operator returns nothing.
        mutates: tensors that are updated in place, by name: ``"statistics.min_val"``.
        scratch: parameters that only say where results may be written. Traced graphs leave them out.
        has_kernel: whether `tritonq.kernels` has it too; if not, the reference runs on every device.
        overwrites: names of tensors that the function may use as memory for results. Traced graphs pass copies.
        visible: whether a compiler sees the reference's tensor operations where no kernel runs, instead of one opaque
            call. Such a function reads no value on the host while a graph is traced, and reads buffers that training
            changes from copies (see `tritonq.remember`).
        made_again: whether a compiled backward makes results as large as the first tensor again instead of keeping
            them: for results that are cheap to compute from tensors that are kept anyway, such as codes of weights.
    """

    def mark(function: _Function) -> _Function:
        function.operator = OperatorSpec(  # type: ignore[attr-defined]
            returns, mutates, scratch, has_kernel, overwrites, visible, made_again
        )
        return function

    return mark


def operators_by_family() -> dict[str, dict[str, Callable[..., Any]]]:
    """Return all operators as ``{family: {name: function}}``, such as ``["min_max"]["observe"]``.

    A family is the name of a module of `tritonq.reference` that has operators.
    """
    package = importlib.import_module("tritonq.reference")
    families: dict[str, dict[str, Callable[..., Any]]] = {}
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        for name, function in vars(module).items():
            if isinstance(getattr(function, "operator", None), OperatorSpec) and function.__module__ == module.__name__:
                families.setdefault(entry.name, {})[name] = function
    return families
