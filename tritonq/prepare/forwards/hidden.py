"""Children that preparation added, and that code which walks a module's children should not meet.

Such code runs ``nn.Sequential(*model.children())``, loops over a ``ModuleDict`` or counts layers, and knows the float
model. Hidden children are in ``named_modules()``, state dicts and the module's representation as any others are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


class HidesChildren(nn.Module):
    """Mixin: ``children()`` leaves some out, which switch mode, move and are visited with the others all the same."""

    _tritonq_hidden: frozenset[str] = frozenset()

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """See base class."""
        return ((name, child) for name, child in super().named_children() if name not in self._tritonq_hidden)

    def train(self, mode: bool = True) -> Any:
        """See base class."""
        for child in self._hidden_children():
            child.train(mode)
        return super().train(mode)

    def apply(self, fn: Callable[[nn.Module], Any]) -> Any:
        """See base class."""
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
    """Return methods that make one of torch's container classes pass over hidden children; empty for other classes."""
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
