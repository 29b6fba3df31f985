"""What the code-generation report compiles: launchers called on meta tensors, exactly as a GPU call would launch them.

One module per family of operators, with its cases in ``CASES``; modules are found, no list names them. Strides, sizes
and alignments come from the tensors, tiles from the same functions that choose them on a GPU.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from tritonq.perf.codegen_case import CodegenCase


@cache
def cases_by_family() -> dict[str, tuple[CodegenCase, ...]]:
    """Return the cases by the name of their module, which is also that of the kernels' module."""
    return {
        module.name: importlib.import_module(f"{__name__}.{module.name}").CASES
        for module in pkgutil.iter_modules(__path__)
    }


def all_cases() -> tuple[CodegenCase, ...]:
    """Return every case, family by family."""
    return tuple(case for cases in cases_by_family().values() for case in cases)
