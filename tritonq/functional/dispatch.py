"""The choice of `tritonq.backend`, or its delay: a graph that ``torch.compile`` traces makes it when it runs."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from tritonq import backend as choice
from tritonq.backend import Backend


def implementation(name: str, x: Tensor, backend: Backend = "auto") -> ModuleType:
    """Return the module that implements op family ``name`` for ``x``; see :func:`tritonq.backend.implementation`.

    While a graph is traced it is that of `tritonq.functional.traced`, whose operators choose when they run, by tensor
    and by :func:`~tritonq.use_backend`; those that a compiler sees into chose when they were traced.

    Raises:
        NotImplementedError: a traced call that asks for one backend by itself, or of a family without such a module.
    """
    if not torch.compiler.is_compiling():
        return choice.implementation(name, x, backend)
    return _traced(name, backend)


def without_kernel(name: str, x: Tensor) -> ModuleType:
    """Return the module of a family that has no kernel: :func:`tritonq.backend.without_kernel`, or its traced form."""
    if torch.compiler.is_compiling():
        return _traced(name, "auto")
    return choice.without_kernel(name, x)


def _traced(name: str, backend: Backend) -> ModuleType:
    # Imported here, so that the operators are registered when something is compiled, and not before.
    from tritonq.functional import traced

    if backend != "auto":
        raise NotImplementedError(f"torch.compile traces backend='auto' alone (see use_backend), got {backend!r}")
    if name not in traced.FAMILIES:
        raise NotImplementedError(f"torch.compile can't trace {name} yet; disable compilation of what calls it")
    return traced.FAMILIES[name]
