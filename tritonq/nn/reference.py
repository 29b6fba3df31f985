"""References from a module to modules that other modules own."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


class Reference(Generic[M]):
    """A reference to a module that is used here and owned by another module; its ``module`` is None if there is none.

    ``nn.Module`` takes every module that is assigned to an attribute for a child: its tensors would appear in the state
    dict a second time, and ``to()``, ``train()`` and ``named_modules()`` would visit it twice. A Reference is an
    ordinary attribute instead. ``copy.deepcopy`` and ``pickle`` follow it: if both modules are copied together, the
    copy of the user refers to the copy of the owner. It keeps the module alive.
    """

    __slots__ = ("module",)

    def __init__(self, module: M | None = None) -> None:
        self.module = module

    def __repr__(self) -> str:
        return f"Reference({type(self.module).__name__})"


class ReferringModule(nn.Module):
    """Base of modules that hold :class:`Reference` objects in the attributes named by ``_references``.

    In version 0.1.0 these attributes were tuples of one module; they become References when such a pickle is loaded.
    """

    # Attributes that hold a Reference.
    _references: ClassVar[tuple[str, ...]] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in self._references:
            if isinstance(state[name], tuple):
                state[name] = Reference(state[name][0])
        super().__setstate__(state)  # type: ignore[no-untyped-call]
