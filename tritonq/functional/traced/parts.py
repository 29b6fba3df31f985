"""Arguments of any structure as the plain arguments that ``torch.library`` takes, and back.

Plain arguments are tensors, numbers, strings, dtypes, and lists of them. A *part* describes how one argument becomes
plain ones: as it is (:class:`Leaf`), as two (:class:`NumberOrTensor`), or field by field (:class:`Structure`).
``grid=Grid(...)`` becomes ``has_grid, grid_scale, grid_zero_point, ...``.
"""

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
    """An argument that ``torch.library`` takes as it is.

    Attributes:
        name: of the argument; of a structure's field ``<name>_<field>``.
        kind: its type in a schema of ``torch.library``, such as ``"Tensor"`` or ``"int[]"``, with ``?`` if it may be
            None.
        make: applied, when the operator runs, to an argument that is not None: ``tuple`` for a tuple, of which
            ``torch.library`` makes a list. None: nothing is applied.
    """

    name: str
    kind: str
    make: Callable[[Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class NumberOrTensor:
    """An argument that is a float or a tensor: two plain arguments, one of them None; both are None if it is None.

    They are called ``<name>_number`` and ``<name>_tensor``, where ``name`` is the argument's.
    """

    name: str


@dataclasses.dataclass(frozen=True)
class Structure:
    """An argument that is a dataclass or named tuple: one or more plain arguments per field.

    Attributes:
        name: of the argument; the plain arguments of its fields are called ``<name>_<field>``.
        make: called with the values of the fields by position; returns the dataclass or named tuple.
        fields: for each field its name in the class, such as ``"scale"``, and its part.
        optional: whether its own type allows None; one more plain argument comes first then, ``has_<name>``, which is
            False for None.
    """

    name: str
    make: Callable[..., Any]
    fields: tuple[tuple[str, Part], ...]
    optional: bool


Part: TypeAlias = "Leaf | NumberOrTensor | Structure"
Parts: TypeAlias = "Sequence[tuple[str, Part]]"


def describe(name: str, hint: Any, optional: bool = False) -> Part:
    """Return the part that describes a parameter, from its type.

    Args:
        name: of the parameter.
        hint: its type: a plain one, a Literal of strings, a tuple or list whose elements all have one plain type, a
            dataclass or named tuple of such fields, or ``float | Tensor``; each of these also with ``| None``.
        optional: True: it is a field of a structure that may be None, so that its plain arguments may be None.

    Raises:
        TypeError: no plain arguments can stand for this type.
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
    elements = [kind for kind in dict.fromkeys(get_args(hint)) if kind is not Ellipsis]
    if get_origin(hint) in (tuple, list) and len(elements) == 1 and elements[0] in _PLAIN:
        kept = tuple if get_origin(hint) is tuple else None
        return Leaf(name, f"{_PLAIN[elements[0]]}[]{mark}", kept)
    if hint in _PLAIN:
        return Leaf(name, f"{_PLAIN[hint]}{mark}")
    if not isinstance(hint, type) or not (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields")):
        raise TypeError(f"{name}: an operator can't take {hint}")
    hints = get_type_hints(hint)
    names = [field.name for field in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else hint._fields
    fields = tuple((field, describe(f"{name}_{field}", hints[field], optional or can_be_none)) for field in names)
    # Structures without tensors are few: each is made, and checked, once.
    make = hint if any(kind.startswith("Tensor") for _, kind in _arguments(fields)) else lru_cache(hint)
    return Structure(name, make, fields, can_be_none)


def schema(parts: Parts, mutated: Sequence[str]) -> str:
    """Return the arguments of a schema, such as ``"Tensor x, Tensor(a1!) grid_scale, int axis"``.

    Args:
        parts: name and part of each parameter.
        mutated: names of plain arguments that the operator writes to, such as ``"grid_scale"``. Their mark, such as
            ``(a1!)``, has the argument's index among all plain arguments, counted from 0.

    Raises:
        ValueError: a name in ``mutated`` that is no tensor argument.
    """
    declared: list[str] = []
    unknown = set(mutated)
    for name, kind in _arguments(parts):
        if name in unknown and kind.startswith("Tensor"):
            unknown.remove(name)
            kind = kind.replace("Tensor", f"Tensor(a{len(declared)}!)", 1)
        declared.append(f"{kind} {name}")
    if unknown:
        raise ValueError(f"no tensor argument is called {', '.join(sorted(unknown))}")
    return ", ".join(declared)


def _arguments(parts: Parts) -> Iterator[tuple[str, str]]:
    """Yield name and schema type of each plain argument, in order."""
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
    """Return the values of the plain arguments for ``arguments``, in the order of :func:`schema`; tensors are shared.

    Args:
        parts: name and part of each parameter.
        arguments: a value for each parameter, by name.
    """
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
    """Return the parameters' values by name from those of the plain arguments: the inverse of :func:`flatten_all`.

    Args:
        parts: name and part of each parameter.
        flat: values of all plain arguments, in the order of :func:`schema`; lists become tuples where the type says so.
    """
    values = iter(flat)
    return {name: _rebuild(part, values, True) for name, part in parts}


def _rebuild(part: Part, values: Iterator[Any], present: bool) -> Any:
    """Return the next parameter's value (or field's), built from as many plain arguments as it has.

    Args:
        part: describes it.
        values: the plain arguments that are left; advanced.
        present: False inside of a structure that is None: its plain arguments are dropped, and the result is None.
    """
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
