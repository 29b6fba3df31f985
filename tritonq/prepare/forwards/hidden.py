"""Hide the children that preparation added from code that walks through a module's children.

Such code runs ``nn.Sequential(*model.children())``, loops over a ``ModuleDict`` or counts layers, and was written for
the float model. Hidden children are still in ``named_modules()``, in state dicts and in the printed module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


class HidesChildren(nn.Module):
    """Leave the children named in ``_tritonq_hidden`` out of ``children()`` and ``named_children()``.

    So ``children()`` gives what the module had before, such as a Sequential that got quantizers as children. Hidden
    children switch mode, move to devices and are visited by ``apply`` as all others are. A subclass sets the names.
    """

    _tritonq_hidden: frozenset[str] = frozenset()

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield ``(name, child)`` of the children that are not hidden."""
        return ((name, child) for name, child in super().named_children() if name not in self._tritonq_hidden)

    def train(self, mode: bool = True) -> Any:
        """Switch the mode of the module and all its children, the hidden ones too; return the module."""
        for child in self._hidden_children():
            child.train(mode)
        return super().train(mode)

    def apply(self, fn: Callable[[nn.Module], Any]) -> Any:
        """Call ``fn`` on every module inside, the hidden ones too, and on the module itself, which is returned."""
        for child in self._hidden_children():
            child.apply(fn)
        return super().apply(fn)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for child in self._hidden_children() if recurse else ():
            child._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _hidden_children(self) -> list[nn.Module]:
        return [child for name in sorted(self._tritonq_hidden) if (child := self._modules.get(name)) is not None]


def container_methods(original: type[nn.Module], hidden: frozenset[str]) -> dict[str, Callable[..., Any]]:
    """Return methods that let a container pass over hidden children: its length and iteration, keys or indexing.

    ``[…]`` of a ModuleDict still finds a hidden child. A slice is a plain Sequential or ModuleList.

    Args:
        original: the container's class.
        hidden: names of the hidden children.

    Returns:
        Methods by name, such as "__len__", for a subclass of ``original``; empty if nothing is hidden, or if
        ``original`` is no Sequential, ModuleList or ModuleDict.
    """
    if not hidden:
        return {}

    def visible(self: nn.Module) -> OrderedDict[str, nn.Module]:
        return OrderedDict((name, child) for name, child in self._modules.items() if name not in hidden)  # type: ignore[misc]

    counted: dict[str, Callable[..., Any]] = {"__len__": lambda self: len(visible(self))}
    if issubclass(original, nn.ModuleDict):
        return counted | {
            "__iter__": lambda self: iter(visible(self)),
            "__contains__": lambda self, key: key in visible(self),
            "keys": lambda self: visible(self).keys(),
            "items": lambda self: visible(self).items(),
            "values": lambda self: visible(self).values(),
        }
    ordered = counted | {"__iter__": lambda self: iter(visible(self).values())}
    if issubclass(original, nn.Sequential):
        return ordered | {"__getitem__": lambda self, index: nn.Sequential(visible(self))[index]}
    if issubclass(original, nn.ModuleList):
        return ordered | {"__getitem__": lambda self, index: nn.ModuleList(visible(self).values())[index]}
    return {}
