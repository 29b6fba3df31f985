"""Structures as the plain arguments that ``torch.library`` takes, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

_PLAIN = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An argument that ``torch.library`` takes.

    Attributes:
        name: of the argument.
        kind: its type in a schema, with ``?`` where it may be None.
        make: applied to the argument when the operator runs; None: it is taken as it is.
    """

    name: str
    kind: str
    make: Callable[[Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class NumberOrTensor:
    """A float or a tensor, as two arguments of which one is None."""

    name: str


@dataclasses.dataclass(frozen=True)
class Structure:
    """A dataclass or named tuple: its constructor and its fields.

    Attributes:
        name: of the argument; its fields are called ``<name>_<field>``.
        make: takes the fields by position.
        fields: name and part of each.
        optional: whether it may be None; one more argument, ``has_<name>``, tells.
    """

    name: str
    make: Callable[..., Any]
    fields: tuple[tuple[str, Part], ...]
    optional: bool


Part: TypeAlias = "Leaf | NumberOrTensor | Structure"
Parts: TypeAlias = "Sequence[tuple[str, Part]]"


def describe(name: str, hint: Any, optional: bool = False) -> Part:
    """Describe a parameter by its type.

    Args:
        name: of the argument.
        hint: its type.
        optional: whether it belongs to a structure that may be None.

    Raises:
        TypeError: a type that no plain arguments stand for.
    """
    can_be_none = False
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        can_be_none = len(kinds) < len(get_args(hint))
        if set(kinds) == {float, Tensor}:
            return NumberOrTensor(name)
        if len(kinds) != 1:
            raise TypeError(f"{name}: an operator can't take {hint}")
        (hint,) = kinds
    mark = "?" if optional or can_be_none else ""
    if get_origin(hint) is Literal:
        return Leaf(name, f"str{mark}")
    if get_origin(hint) in (tuple, list):
        kept = tuple if get_origin(hint) is tuple else None
        return Leaf(name, f"{_PLAIN[get_args(hint)[0]]}[]{mark}", kept)
    if hint in _PLAIN:
        return Leaf(name, f"{_PLAIN[hint]}{mark}")
    if not isinstance(hint, type) or not (dataclasses.is_dataclass(hint) or issubclass(hint, tuple)):
        raise TypeError(f"{name}: an operator can't take {hint}")
    hints = get_type_hints(hint)
    names = [field.name for field in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else hint._fields  # type: ignore[attr-defined]
    fields = tuple((field, describe(f"{name}_{field}", hints[field], optional or can_be_none)) for field in names)
    # Structures without tensors are few: each is made, and checked, once.
    make = hint if any(kind.startswith("Tensor") for _, kind in _arguments(fields)) else lru_cache(hint)
    return Structure(name, make, fields, can_be_none)


def schema(parts: Parts, mutated: Sequence[str]) -> str:
    """Return the arguments of a schema; those whose names are in ``mutated`` are written to.

    Raises:
        ValueError: a name in ``mutated`` that is no tensor argument.
    """
    declared: list[str] = []
    unknown = set(mutated)
    for name, kind in _arguments(parts):
        if name in unknown:
            unknown.remove(name)
            kind = kind.replace("Tensor", f"Tensor(a{len(declared)}!)", 1)
        declared.append(f"{kind} {name}")
    if unknown:
        raise ValueError(f"no tensor argument is called {', '.join(sorted(unknown))}")
    return ", ".join(declared)


def _arguments(parts: Parts) -> Iterator[tuple[str, str]]:
    """Yield name and type of each plain argument."""
    for _, part in parts:
        if isinstance(part, Leaf):
            yield part.name, part.kind
        elif isinstance(part, NumberOrTensor):
            yield from ((f"{part.name}_number", "float?"), (f"{part.name}_tensor", "Tensor?"))
        else:
            if part.optional:
                yield f"has_{part.name}", "bool"
            yield from _arguments(part.fields)


def flatten_all(parts: Parts, arguments: dict[str, Any]) -> list[Any]:
    """Return the plain arguments that stand for ``arguments``."""
    flat: list[Any] = []
    for name, part in parts:
        _flatten(part, arguments[name], flat)
    return flat


def _flatten(part: Part, value: Any, flat: list[Any]) -> None:
    if isinstance(part, Leaf):
        flat.append(value)
    elif isinstance(part, NumberOrTensor):
        flat.append(None if isinstance(value, Tensor) else value)
        flat.append(value if isinstance(value, Tensor) else None)
    else:
        if part.optional:
            flat.append(value is not None)
        for name, field in part.fields:
            _flatten(field, None if value is None else getattr(value, name), flat)


def rebuild_all(parts: Parts, flat: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments that :func:`flatten_all` took apart."""
    values = iter(flat)
    return {name: _rebuild(part, values, True) for name, part in parts}


def _rebuild(part: Part, values: Iterator[Any], present: bool) -> Any:
    """Build the next value. Of a structure that is not there, the fields are taken and dropped."""
    if isinstance(part, Leaf):
        value = next(values)
        return value if part.make is None or value is None else part.make(value)
    if isinstance(part, NumberOrTensor):
        number, tensor = next(values), next(values)
        return number if tensor is None else tensor
    if part.optional:
        present = next(values) and present
    fields = [_rebuild(field, values, present) for _, field in part.fields]
    return part.make(*fields) if present else None
