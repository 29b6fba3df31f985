"""The benchmark cases: one module per family of operators, and one for whole training steps.

A module has a function ``cases``. Most have a class for one problem, whose methods make its inputs, its reference and
its :class:`tritonq.perf.case.Case`. The *least traffic* of a case is the memory that the best possible implementation
must read and write (``bytes_moved``). The *baseline* is the implementation that times are divided by.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache

from tritonq.perf.case import Case


@cache
def families() -> dict[str, Callable[[], Iterator[Case]]]:
    """Return the function ``cases`` of each module that has one, by the module's name; no list names the modules."""
    names = [entry.name for entry in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module.cases for name, module in modules.items() if hasattr(module, "cases")}


@cache
def all_cases() -> tuple[Case, ...]:
    """Return every case, family by family.

    Raises:
        ValueError: two cases share a name, so that their results could not be told apart.
    """
    cases = tuple(case for make in families().values() for case in make())
    names = [case.name for case in cases]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"case names are not unique: {', '.join(repeated)}")
    return cases
