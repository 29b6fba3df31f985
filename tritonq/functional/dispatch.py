"""Choose the module that implements an operator: by tensor in eager code, the traced form under ``torch.compile``.

A *family* is the operators of one file, such as ``"fake_quant"``: a module of that name in `tritonq.reference`
(PyTorch), often in `tritonq.kernels` (Triton), sometimes in `tritonq.compiled` (C++), with the same functions. The
*traced form* (`tritonq.functional.traced`) has them as custom operators, which choose among the three when the graph
runs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from tritonq import backend as choice
from tritonq.backend import Backend


def implementation(name: str, x: Tensor, backend: Backend = "auto") -> ModuleType:
    """Return the module with the functions of family ``name`` to call for ``x``.

    In eager code it is a module of `tritonq.kernels` for a CUDA or HIP tensor of float32, float16, bfloat16 or 8-bit
    codes if triton is installed, else of `tritonq.reference`; :func:`~tritonq.use_backend` may choose another,
    `tritonq.compiled` on a CPU among them.
    While ``torch.compile`` traces, it is the traced form: its operators choose when the graph runs, by the same rule.
    Operators that a compiler sees into (`tritonq.functional.traced.visible`) choose when they are traced.

    Args:
        name: the family, such as ``"fake_quant"``; one that has kernels (:func:`without_kernel` takes the others).
        x: the tensor whose device and dtype decide.
        backend: ``"auto"`` (the rule above), or ``"triton"``, ``"torch"`` or ``"compiled"`` for that one. With the
            last, a family without C++ is that of `tritonq.reference`.

    Raises:
        ValueError: an unknown backend, in eager code.
        RuntimeError: ``"triton"`` or ``"compiled"`` was asked for, here or by ``use_backend``, and can't run on ``x``.
        NotImplementedError: while tracing: a ``backend`` other than ``"auto"``, or a family without traced form.
    """
    if not torch.compiler.is_compiling():
        return choice.implementation(name, x, backend)
    return _traced(name, backend)


def without_kernel(name: str, x: Tensor) -> ModuleType:
    """Return the module of a family that has no Triton kernel.

    It is that of `tritonq.compiled` if ``x`` is on a CPU, ``use_backend("compiled")`` is active and the family has C++;
    else that of `tritonq.reference`; while ``torch.compile`` traces, the traced form.

    Args:
        name: the family, such as ``"eval_codes"``.
        x: the tensor whose device decides.

    Raises:
        NotImplementedError: while tracing, a family without traced form.
    """
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
