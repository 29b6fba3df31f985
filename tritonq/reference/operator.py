"""Marks the functions of `tritonq.reference` that are operators, with what a traced graph must know of them.

An operator has one signature: the reference's. Its kernel launcher has the same parameters, and
`tritonq.functional.traced` makes its form for ``torch.compile`` from it.
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
    """A result laid out as ``torch.empty_like(argument)``.

    Attributes:
        argument: name of a tensor parameter, or of a tensor in a structure: ``"grid.scale"``.
        dtype: of the result, the parameter that gives it, or a function of the argument's dtype; None: the argument's.
        prepare: applied to the argument first.
    """

    argument: str
    dtype: torch.dtype | str | Callable[[torch.dtype], torch.dtype] | None = None
    prepare: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class New:
    """A contiguous result.

    Attributes:
        shape: called with the operator's arguments by name.
        argument: name of a tensor parameter, for the device and where ``dtype`` is None the dtype.
        dtype: of the result, or the parameter that gives it.
        keeps_format: whether the result lies channels last where the argument does.
    """

    shape: Callable[[dict[str, Any]], tuple[int, ...]]
    argument: str
    dtype: torch.dtype | str | None = None
    keeps_format: bool = False


@dataclass(frozen=True)
class CopyOf:
    """A result that is the grid given as ``argument``, as it is when the operator returns; None where that is None.

    Attributes:
        argument: name of the parameter.
        shape: of scale, zero point and switch, called with the operator's arguments by name; None: the grid's own, and
            one element for the switch.
    """

    argument: str
    shape: Callable[[dict[str, Any]], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Given:
    """A result that is an argument itself."""

    argument: str


@dataclass(frozen=True)
class OperatorSpec:
    """The arguments of :func:`operator`, as :func:`operator` documents them, for tracing."""

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
    """Mark a function as an operator.

    Args:
        returns: shaped as the result, with :class:`Like`, :class:`New`, :class:`CopyOf` or :class:`Given` in place of
            each tensor or grid. All else in it stands in the traced result as it is.
        mutates: tensors that are updated in place, by name: ``"statistics.min_val"``.
        scratch: parameters that only say where results may be written. Traced graphs leave them out.
        has_kernel: whether `tritonq.kernels` has it too; if not, the reference runs on every device.
        overwrites: tensors that may be used as memory for results. Traced graphs hand over copies.
        visible: whether a compiler sees the reference's tensor operations where no kernel runs, instead of one opaque
            call. Such a function reads no value on the host while a graph is traced, and what it derives from buffers
            that training moves it derives from copies (see `tritonq.remember`).
        made_again: whether a compiled backward makes results as large as the first tensor again instead of keeping
            them: for what is cheap to make of tensors that are kept anyway, as codes of weights are.
    """

    def mark(function: _Function) -> _Function:
        function.operator = OperatorSpec(  # type: ignore[attr-defined]
            returns, mutates, scratch, has_kernel, overwrites, visible, made_again
        )
        return function

    return mark


def operators_by_family() -> dict[str, dict[str, Callable[..., Any]]]:
    """Return every operator by the module of `tritonq.reference` that defines it, and by name."""
    package = importlib.import_module("tritonq.reference")
    families: dict[str, dict[str, Callable[..., Any]]] = {}
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        for name, function in vars(module).items():
            if isinstance(getattr(function, "operator", None), OperatorSpec) and function.__module__ == module.__name__:
                families.setdefault(entry.name, {})[name] = function
    return families
