"""Give a new module the class of the one that it replaces, too, so that methods and ``isinstance`` work as before."""

from __future__ import annotations

import copyreg
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from tritonq.nn.original_class import original_class


class KeepsClass(nn.Module):
    """Let objects of the classes that :func:`joined_class` makes be pickled and copied.

    Such a class is made at run time, so that ``pickle`` can't import it by name: its objects are written with the two
    classes that it derives from, the new module's and the replaced module's, and it is made again when they are read.

    Attributes:
        _tritonq_joined: the two classes: the new module's, then the replaced module's.
    """

    _tritonq_joined: tuple[type[nn.Module], type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what ``pickle`` and ``copy`` take, with the two classes for this one, which they can't import."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (new_joined, self._tritonq_joined, *reduced[2:])
        return reduced


def keep_class(kind: type[nn.Module], made: nn.Module) -> None:
    """Let ``made`` be of the class ``kind``, too: change its class in place to that of :func:`joined_class`.

    Its own class comes first. Nothing happens if it is of the class ``kind`` already, or if Python can't join the two.
    """
    if isinstance(made, kind):
        return
    with suppress(TypeError):  # some classes can't have a common subclass
        made.__class__ = joined_class(type(made), kind)


def users_class(module: nn.Module) -> type[nn.Module]:
    """Return the replaced module's class, if :func:`keep_class` gave it to ``module``; else the module's own class.

    If the module's forward was edited, its own class is the one that its author wrote (:func:`original_class`).
    """
    kind: type[nn.Module] = original_class(module)
    return kind._tritonq_joined[1] if issubclass(kind, KeepsClass) else kind


def made_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that ``module`` had before :func:`keep_class`, if that changed it; else the module's own class.

    If the module's forward was edited, its own class is the one that its author wrote (:func:`original_class`).
    """
    kind: type[nn.Module] = original_class(module)
    return kind._tritonq_joined[0] if issubclass(kind, KeepsClass) else kind


# For the two classes of each pair, what derives from both.
_joined: WeakValueDictionary[tuple[type, type], type[nn.Module]] = WeakValueDictionary()


def joined_class(first: type[nn.Module], second: type[nn.Module]) -> type[nn.Module]:
    """Return the class that derives from :class:`KeepsClass`, then ``first``, then ``second``.

    Calls with the same two classes return the same class as long as something uses it.

    Args:
        first: the new module's class, whose methods come first. The result has the name of ``first``, or that of
            ``second`` if ``first`` has an attribute ``stands_for``: the class in whose place it is used.
        second: the class of the module that was replaced.

    Raises:
        TypeError: Python can't make such a class, such as for classes whose orders of bases or metaclasses conflict.
    """
    known = _joined.get((first, second))
    if known is not None:
        return known
    # A class that stands for one of torch goes by the name of that, and so by the user's.
    shown = second if hasattr(first, "stands_for") else first
    namespace: dict[str, Any] = {
        "_tritonq_joined": (first, second),
        "__module__": shown.__module__,
        "__qualname__": shown.__qualname__,
        "__doc__": shown.__doc__,
    }
    if shown is second:
        namespace["stands_for"] = second
    metaclass: Any = type(second)
    made: type[nn.Module] = metaclass(shown.__name__, (KeepsClass, first, second), namespace)
    _joined[first, second] = made
    return made


def new_joined(first: type[nn.Module], second: type[nn.Module]) -> nn.Module:
    """Return an object of :func:`joined_class` without attributes, for a pickle or copy that sets them next.

    Args:
        first: the new module's class.
        second: the class of the module that was replaced.
    """
    kind = joined_class(first, second)
    return kind.__new__(kind)
