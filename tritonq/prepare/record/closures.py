"""Functions on a model that hold its modules and tensors in their closures: hooks, replaced forwards, attributes.

``copy.deepcopy`` shares functions, so that a copied model's would run and train the original's modules.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def rebind_closures(original: nn.Module, copied: nn.Module) -> None:
    """Let functions that a copied model holds refer to the copy's modules, parameters and buffers.

    ``copied`` is changed in place; ``original`` and its functions stay as they are. The functions are Python functions,
    bound methods and ``functools.partial`` objects, in attributes of modules and in dicts, lists and tuples that are
    attributes, as those of hooks are. A new function takes the place of each that refers to the original in its
    closure, default values, owner (``__self__``) or fixed arguments. What else these hold stays the same object, such
    as the dict that a hook fills for its author.
    """
    rebinder = _Rebinder(_counterparts(original, copied))
    for module in copied.modules():
        held = vars(module)
        for name, value in list(held.items()):
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            if isinstance(value, dict):
                value.update({key: new for key, item in value.items() if (new := rebinder.rebound(item)) is not item})
            elif isinstance(value, list):
                value[:] = [rebinder.rebound(item) for item in value]
            elif isinstance(value, tuple) and any(rebinder.rebound(item) is not item for item in value):
                # Named tuples are made of their items.
                items = [rebinder.rebound(item) for item in value]
                held[name] = type(value)(*items) if hasattr(value, "_fields") else tuple(items)
            elif (new := rebinder.rebound(value)) is not value:
                held[name] = new


def error_text(error: BaseException) -> str:
    """Return the text of an error for a message: its class and its own message, such as ``"ValueError: no batch"``.

    A KeyError whose key is a module has another text. It comes from a forward that looks a module up in a dict with
    modules as keys: the dict holds the original modules, and the model that runs has copies. The text begins as
    ``"forward, line 12 of net.py looks a Conv2d up in a table of modules"``, and advises to use names as keys.
    """
    if not isinstance(error, KeyError) or not error.args or not isinstance(error.args[0], nn.Module):
        return f"{type(error).__name__}: {error}"
    frames = [] if error.__traceback__ is None else traceback.extract_tb(error.__traceback__)
    where = f", line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""
    function = f"{frames[-1].name}{where}" if frames else "a function"
    return (
        f"{function} looks a {type(error.args[0]).__name__} up in a table of modules: preparation copies modules and "
        "puts others in their places, so let the table have names"
    )


def _counterparts(original: nn.Module, copied: nn.Module) -> dict[int, Any]:
    """Return the copies of modules, parameters and buffers, by the identity of the originals."""
    pairs: list[tuple[Any, Any]] = list(zip(original.modules(), copied.modules(), strict=True))
    for old, new in list(pairs):
        for tensors, others in ((old._parameters, new._parameters), (old._buffers, new._buffers)):
            known = dict(others.items())  # those of a scripted module are no dict
            pairs += [(tensor, known.get(name)) for name, tensor in tensors.items() if tensor is not None]
    return {id(old): new for old, new in pairs}


class _Rebinder:
    def __init__(self, counterparts: Mapping[int, Any]) -> None:
        self._counterparts = counterparts
        # Closures that share a cell go on sharing one.
        self._cells: dict[int, CellType] = {}

    def rebound(self, item: Any) -> Any:
        """Return a function that refers to the copied model where ``item`` refers to the original; else ``item``.

        A Python function, bound method or ``functools.partial`` is searched: its closure, default values, owner and
        arguments, and functions among these, but no containers. The result is then a new object, and ``item`` stays as
        it is. Any other ``item`` is returned as it is, also a module or tensor of the original.
        """
        if isinstance(item, FunctionType):
            return self._rebound_function(item)
        if isinstance(item, MethodType):
            owner, function = self._referred(item.__self__), self.rebound(item.__func__)
            is_same = owner is item.__self__ and function is item.__func__
            return item if is_same else MethodType(function, owner)
        if type(item) is partial:
            function, *args = map(self._referred, (item.func, *item.args))
            keywords = {name: self._referred(value) for name, value in item.keywords.items()}
            before, after = (item.func, *item.args, *item.keywords.values()), (function, *args, *keywords.values())
            return item if _are_same(before, after) else partial(function, *args, **keywords)
        return item

    def _rebound_function(self, function: FunctionType) -> FunctionType:
        cells, defaults = function.__closure__ or (), function.__defaults__ or ()
        keywords = function.__kwdefaults__ or {}
        new_cells = tuple(map(self._rebound_cell, cells))
        new_defaults = tuple(map(self._referred, defaults))
        new_keywords = {name: self._referred(item) for name, item in keywords.items()}
        before = (*cells, *defaults, *keywords.values())
        if _are_same(before, (*new_cells, *new_defaults, *new_keywords.values())):
            return function
        made = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            new_defaults or None,
            new_cells if function.__closure__ is not None else None,
        )
        made.__kwdefaults__, made.__qualname__, made.__module__ = (
            new_keywords or None,
            function.__qualname__,
            function.__module__,
        )
        made.__dict__.update(function.__dict__)
        return made

    def _rebound_cell(self, cell: CellType) -> CellType:
        if id(cell) in self._cells:
            return self._cells[id(cell)]
        try:
            held = cell.cell_contents
        except ValueError:  # a name that the enclosing function has not set yet
            return cell
        made = self._cells[id(cell)] = CellType()  # known at once, for a function that refers to itself
        made.cell_contents = self._referred(held)
        if made.cell_contents is held:
            self._cells[id(cell)] = cell
        return self._cells[id(cell)]

    def _referred(self, item: Any) -> Any:
        return self._counterparts[id(item)] if id(item) in self._counterparts else self.rebound(item)


def _are_same(before: Iterable[Any], after: Iterable[Any]) -> bool:
    """Whether two rows hold the same objects."""
    return all(old is new for old, new in zip(before, after, strict=True))
