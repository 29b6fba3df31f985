"""Walk through nested arguments and results (tuples, lists, dicts, dataclasses), and replace the tensors in them.

A *path* is the keys that lead to an entry: ``(0, "mask")`` is the entry ``"mask"`` of the first item.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Path = tuple[str | int, ...]

PRIMITIVES = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format, slice)


@dataclasses.dataclass(frozen=True)
class Opaque:
    """Stand for a recorded argument that is neither tensor, container nor constant; only its type's name is kept.

    Attributes:
        type_name: the ``__qualname__`` of the argument's type, without its module.
    """

    type_name: str


def children_of(item: Any) -> list[tuple[str | int, Any]] | None:
    """Return ``(key, entry)`` pairs of a container; None if ``item`` is no container.

    Keys are indices for tuples and lists, a mapping's own keys, and field names for instances of dataclasses. Nothing
    else is a container.
    """
    if isinstance(item, Mapping):
        return list(item.items())
    if isinstance(item, (tuple, list)):
        return list(enumerate(item))
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return [(field.name, getattr(item, field.name)) for field in dataclasses.fields(item)]
    return None


def tensors_in(item: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield ``(path, tensor)`` for every tensor of a nested structure, in order, one that occurs twice two times.

    ``path`` is put in front of each yielded path; a tensor as ``item`` has this path itself.
    """
    if isinstance(item, Tensor):
        yield path, item
        return
    for key, child in children_of(item) or ():
        yield from tensors_in(child, (*path, key))


def unique_tensors(item: Any) -> list[Tensor]:
    """Return the tensors of a nested structure, each object once, in the order in which they first occur."""
    return list({id(tensor): tensor for _, tensor in tensors_in(item)}.values())


def shares_tensor(inputs: list[Tensor], result: Any) -> bool:
    """Whether the nested structure ``result`` holds one of the tensors ``inputs``, as the same object."""
    held = {id(tensor) for tensor in inputs}
    return any(id(tensor) in held for _, tensor in tensors_in(result))


def describe(item: Any, leaf: Callable[[Tensor], Any]) -> Any:
    """Return a nested structure as plain tuples and dicts, to be kept in a record.

    Tuples and lists become tuples; mappings, and dataclasses by field name, become dicts. Each tensor becomes
    ``leaf(tensor)``; constants (None, numbers, texts, dtypes, devices, slices and the like) stay; anything else becomes
    an :class:`Opaque`.
    """
    if isinstance(item, Tensor):
        return leaf(item)
    if isinstance(item, PRIMITIVES) or item is Ellipsis:
        return item
    children = children_of(item)
    if children is None:
        return Opaque(type(item).__qualname__)
    if isinstance(item, (tuple, list)):
        return tuple(describe(child, leaf) for _, child in children)
    return {key: describe(child, leaf) for key, child in children}


def replace_leaves(item: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return a nested structure in which each entry ``x`` that is no container is replaced by ``leaf(x)``.

    Tuples, named tuples, lists, dicts and ordered dicts are rebuilt; other containers, such as dataclasses and other
    subclasses of dict or list, count as entries.
    """
    if type(item) in (tuple, list):
        return type(item)(replace_leaves(child, leaf) for child in item)
    if type(item) in (dict, OrderedDict):
        return type(item)((key, replace_leaves(child, leaf)) for key, child in item.items())
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(replace_leaves(child, leaf) for child in item))
    return leaf(item)


def replace_tensors(item: Any, leaf: Callable[[Tensor], Any]) -> Any:
    """Return a nested structure in which each tensor ``x`` is replaced by ``leaf(x)``.

    The containers that :func:`replace_leaves` rebuilds are rebuilt; everything else is returned as it is.
    """
    return replace_leaves(item, lambda x: leaf(x) if isinstance(x, Tensor) else x)


def clone_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return copies of ``(args, kwargs)`` with their tensors cloned, so that a model may write to them.

    A tensor that is passed twice is cloned once, and passed twice again. Containers that :func:`replace_leaves` does
    not rebuild, such as dataclasses, and the tensors in them are shared.
    """
    clones: dict[int, Tensor] = {}

    def clone(tensor: Tensor) -> Tensor:
        return clones.setdefault(id(tensor), tensor.clone())

    copied: tuple[tuple[Any, ...], dict[str, Any]] = replace_tensors((args, kwargs), clone)
    return copied


def replace_at(item: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """Return a copy of a nested structure in which the entry at ``path`` is ``change(entry)``.

    Only the containers on the way are copied. An empty path gives ``change(item)``. If a container on the way has no
    entry under the path's key, the copy has the same entries as ``item``.

    Raises:
        TypeError: the path goes on inside of something that is no tuple, list or plain dict, such as a tensor, None, a
            dataclass or a subclass of dict.
    """
    if not path:
        return change(item)
    key, rest = path[0], path[1:]
    if isinstance(item, tuple):
        entries = [replace_at(child, rest, change) if i == key else child for i, child in enumerate(item)]
        return type(item)(*entries) if hasattr(item, "_fields") else tuple(entries)
    if isinstance(item, list):
        return [replace_at(child, rest, change) if i == key else child for i, child in enumerate(item)]
    if type(item) is dict:
        return {name: replace_at(child, rest, change) if name == key else child for name, child in item.items()}
    raise TypeError(f"can't replace a tensor inside a {type(item).__qualname__}; pass tuples, lists or dicts")
