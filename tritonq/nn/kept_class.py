"""Modules that are of the class of the one that they replaced, too: its methods and ``isinstance`` go on working."""

from __future__ import annotations

import copyreg
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from tritonq.nn.original_class import original_class


class KeepsClass(nn.Module):
    """Mixin of classes made at run time: those of a new module, before those of the module that it replaced.

    ``_tritonq_joined`` holds the two.
    """

    _tritonq_joined: tuple[type[nn.Module], type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Name the two classes: pickles and deep copies make the class from them."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (new_joined, self._tritonq_joined, *reduced[2:])
        return reduced


def keep_class(kind: type[nn.Module], made: nn.Module) -> None:
    """Let ``made`` be of another class too, where that is possible: what its own class defines comes first."""
    if isinstance(made, kind):
        return
    with suppress(TypeError):  # some classes can't have a common subclass
        made.__class__ = joined_class(type(made), kind)


def users_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that :func:`keep_class` gave to a module, or its own, as its author wrote it."""
    kind: type[nn.Module] = original_class(module)
    return kind._tritonq_joined[1] if issubclass(kind, KeepsClass) else kind


def made_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before :func:`keep_class`, or its own, as its author wrote it."""
    kind: type[nn.Module] = original_class(module)
    return kind._tritonq_joined[0] if issubclass(kind, KeepsClass) else kind


# For the two classes of each pair, what derives from both.
_joined: WeakValueDictionary[tuple[type, type], type[nn.Module]] = WeakValueDictionary()


def joined_class(first: type[nn.Module], second: type[nn.Module]) -> type[nn.Module]:
    """Return the class that derives from ``first``, then from ``second``.

    Raises:
        TypeError: there is no such class.
    """
    known = _joined.get((first, second))
    if known is not None:
        return known
    namespace = {
        "_tritonq_joined": (first, second),
        "__module__": first.__module__,
        "__qualname__": first.__qualname__,
        "__doc__": first.__doc__,
    }
    metaclass: Any = type(second)
    made: type[nn.Module] = metaclass(first.__name__, (KeepsClass, first, second), namespace)
    _joined[first, second] = made
    return made


def new_joined(first: type[nn.Module], second: type[nn.Module]) -> nn.Module:
    """Return an object of :func:`joined_class` without state."""
    kind = joined_class(first, second)
    return kind.__new__(kind)
