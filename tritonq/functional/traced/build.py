"""Makes the traced form of an operator, a custom operator of torch, from the signature of its reference.

``torch.library`` operators take neither dataclasses nor named tuples. Each such argument becomes one plain argument per
field, and is built again from them when the operator runs (`parts`); results likewise (`results`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias, get_type_hints

import torch
from torch import Tensor

from tritonq.backend import implementation
from tritonq.functional.traced import parts, results
from tritonq.functional.traced.visible import make_visible
from tritonq.reference.operator import OperatorSpec, operators_by_family

# Called with the first tensor when an operator runs; returns the function that runs.
Choice: TypeAlias = Callable[[Tensor], Callable[..., Any]]


def traced_families(choices: dict[str, Choice]) -> dict[str, ModuleType]:
    """Return ``{family: module}``: a module has the traced form of each operator of ``tritonq.reference.<family>``.

    Args:
        choices: for operators that run something else than eager code would, by name ``"<family>_<function>"``, such
            as ``"int8_conv_int8_conv2d"``: a function that is called with the operator's first tensor argument when
            the operator runs, and returns the function to run, which is called with all arguments by name.
    """
    families = {}
    for family, operators in operators_by_family().items():
        families[family] = ModuleType(f"{__package__}.{family}", f"`tritonq.reference.{family}` for torch.compile.")
        for name, function in operators.items():
            has_kernel = function.operator.has_kernel  # type: ignore[attr-defined]
            choose = choices.get(f"{family}_{name}", partial(_implementation, family, name) if has_kernel else None)
            setattr(families[family], name, traced_operator(f"{family}_{name}", function, choose))
    return families


def traced_operator(name: str, reference: Callable[..., Any], choose: Choice | None = None) -> Callable[..., Any]:
    """Register the operator ``tritonq::<name>``; return a function with the parameters of ``reference`` that calls it.

    Parameters that only give memory for results (``scratch``) are accepted and ignored.

    Args:
        name: of the operator, such as ``"eval_join"``.
        reference: a function decorated by :func:`tritonq.reference.operator.operator`.
        choose: called with the first tensor argument when the operator runs; returns the function to run, which is
            called with all arguments by name. None: ``reference`` runs.

    Raises:
        TypeError: a parameter has a type that no plain arguments can stand for.
        ValueError: ``reference`` is said to update something that is no tensor argument.
    """
    spec: OperatorSpec = reference.operator  # type: ignore[attr-defined]
    signature, hints = inspect.signature(reference), get_type_hints(reference)
    parameters = [parameter for name, parameter in signature.parameters.items() if name not in spec.scratch]
    described = tuple((p.name, parts.describe(p.name, hints[p.name])) for p in parameters)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    names = tuple(signature.parameters)

    def run(*flat: Any, choose: Choice | None = choose) -> Any:
        tensors = _tensors(flat)
        arguments = parts.rebuild_all(described, flat)
        arguments.update({name: arguments[name].clone() for name in spec.overwrites})
        result = (reference if choose is None else choose(tensors[0]))(**arguments)
        return results.pack(results.separate_tensors(spec.returns, result, arguments, tensors))

    def fake(*flat: Any) -> Any:
        return results.pack(results.prototypes(spec.returns, parts.rebuild_all(described, flat)))

    mutated = [name.replace(".", "_") for name in spec.mutates]
    schema = f"({parts.schema(described, mutated)}) -> {results.schema(spec.returns)}"
    call = torch.library.custom_op(f"tritonq::{name}", run, mutates_args=mutated, schema=schema)
    call.register_fake(fake)
    if spec.visible:
        make_visible(call, partial(run, choose=None), spec.has_kernel, spec.made_again)

    def traced(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        is_surplus = len(given) < len(args) + len(kwargs) or any(name not in names for name in kwargs)
        if is_surplus or any(name not in given and name not in defaults for name, _ in described):
            signature.bind(*args, **kwargs)  # raises the TypeError of a plain function
        arguments = {name: given[name] if name in given else defaults[name] for name, _ in described}
        return results.restore(spec.returns, arguments, call(*parts.flatten_all(described, arguments)))

    traced.__name__, traced.__doc__ = reference.__name__, reference.__doc__
    traced.__signature__ = signature  # type: ignore[attr-defined]
    return traced


def _tensors(flat: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors among plain arguments, those in lists too."""
    found = [tensor for value in flat for tensor in (value if isinstance(value, list) else [value])]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _implementation(family: str, function: str, x: Tensor) -> Callable[..., Any]:
    """Return the function of the family that eager code would call for ``x``."""
    chosen: Callable[..., Any] = getattr(implementation(family, x), function)
    return chosen
