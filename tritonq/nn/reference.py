"""References from a module to modules that other modules own."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


class Reference(Generic[M]):
    """A module that is used here and owned elsewhere; None where there is none.

    ``nn.Module`` takes each module that is assigned to an attribute for a child: its tensors would appear in the state
    dict a second time, and ``to()``, ``train()`` and ``named_modules()`` would visit it twice. A Reference in its place
    is an ordinary attribute. ``copy.deepcopy`` and ``pickle`` follow it: where owner and user are copied together, the
    copy of the user refers to the copy of the owner. It lives as long as the module that holds it.
    """

    __slots__ = ("module",)

    def __init__(self, module: M | None = None) -> None:
        self.module = module

    def __repr__(self) -> str:
        return f"Reference({type(self.module).__name__})"


class ReferringModule(nn.Module):
    """A module that holds References.

    Version 0.1.0 held tuples of one module instead; a model that it pickled gets References when it is loaded.
    """

    # Attributes that hold a Reference.
    _references: ClassVar[tuple[str, ...]] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in self._references:
            if isinstance(state[name], tuple):
                state[name] = Reference(state[name][0])
        super().__setstate__(state)  # type: ignore[no-untyped-call]
