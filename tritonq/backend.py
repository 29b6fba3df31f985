"""Choose the implementation of each call by its tensor: Triton kernels, C++ or PyTorch.

A *family* is a group of operators in one file, such as ``"fake_quant"``. It is a module of the same name in
``tritonq.kernels``, ``tritonq.reference`` and, for some, ``tritonq.compiled``, with functions of the same names and
signatures.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from types import FunctionType, ModuleType
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.autograd import profiler

Backend = Literal["auto", "triton", "torch", "compiled"]
Chosen: TypeAlias = Literal["triton", "torch", "compiled"]

# What kernels load and store, codes included. float64 lives on the PyTorch path alone.
KERNEL_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8})

_BACKENDS = frozenset(get_args(Backend))
# Op families that are compiled for CPUs; "compiled" runs the others in PyTorch.
_COMPILED = frozenset(
    {
        *("batch_norm_weight", "conv_bn", "eval_codes", "fake_quant", "fold", "histogram", "input_codes", "residual"),
        *("rounded", "weight"),
    }
)
_PACKAGES: dict[Chosen, str] = {
    "triton": "tritonq.kernels",
    "torch": "tritonq.reference",
    "compiled": "tritonq.compiled",
}

_preferred: ContextVar[Backend] = ContextVar("tritonq_backend", default="auto")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Choose the backend of every call in the block that leaves ``backend="auto"``, in this thread.

    Args:
        backend: ``"auto"`` (by tensor), ``"triton"`` (kernels, or a RuntimeError of the operator that has none for a
            tensor; families that have no kernels at all run PyTorch), ``"torch"`` (plain PyTorch),
            ``"compiled"`` (C++ on a CPU: `tritonq.compiled`, for training steps, for models in eval mode or
            converted, for fake quantization alone and for histograms). The last compiles for some seconds when it is
            first used on a machine, and says so in the log ``tritonq``. It sums over channels in another order than
            PyTorch, so that a training step's results differ as between two machines; all else gives the same bits.
            Dtypes other than float32, and operators without C++ code, run PyTorch. An operator that gets a tensor on
            another device than a CPU raises RuntimeError.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: ``"compiled"``, and there is no C++ compiler or this is not Linux.

    Examples:
        >>> import tritonq
        >>> with tritonq.use_backend("torch"):
        ...     y = tritonq.fake_quantize_per_tensor_affine(torch.ones(3), 0.1, 0, -128, 127)
    """
    if _checked(backend) == "compiled":
        _require_compiler()
    token = _preferred.set(backend)
    try:
        yield
    finally:
        _preferred.reset(token)


@cache
def has_triton() -> bool:
    """Whether the package triton is installed. Importing it is left to the first kernel call."""
    return importlib.util.find_spec("triton") is not None


@cache
def is_interpreting() -> bool:
    """Whether ``TRITON_INTERPRET=1`` is set, so that Triton runs kernels in its interpreter, on CPU tensors.

    False without triton. The variable is read at the first call, and the answer kept: set it before importing tritonq.
    """
    if not has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def select(x: Tensor, backend: Backend = "auto") -> Chosen:
    """Return the backend for a call on ``x``: ``"triton"``, ``"torch"`` or ``"compiled"``.

    ``"auto"`` is what the block of :func:`use_backend` around the call chose. If that is ``"auto"``, too, or there is
    no such block, CUDA and HIP tensors run kernels if triton is installed, and with ``TRITON_INTERPRET=1`` CPU tensors
    run the same kernels in Triton's interpreter. All else runs PyTorch, float64 among it. ``"compiled"`` is chosen only
    if it is asked for.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: ``"compiled"`` was asked for, here or by the block, and ``x`` is not on a CPU; or ``"triton"``
            was, and triton is not installed, no kernel takes the dtype of ``x``, or ``x`` is neither a CUDA or HIP
            tensor nor, with ``TRITON_INTERPRET=1``, on a CPU.
    """
    choice = _preferred.get() if backend == "auto" else _checked(backend)
    # Without a look at the tensor's dtype, and without a message: operators on a CPU ask this hundreds of times a step.
    if choice == "torch" or (choice == "auto" and x.is_cpu and not is_interpreting()):
        return "torch"
    if choice == "compiled":
        if not x.is_cpu:
            raise RuntimeError(f"backend 'compiled' cannot run here: it runs on CPU tensors, got one on {x.device}")
        return "compiled"
    obstacle = _obstacle(x)
    if obstacle is None:
        return "triton"
    if choice == "triton":
        raise RuntimeError(f"backend 'triton' cannot run here: {obstacle}")
    return "torch"


def implementation(name: str, x: Tensor, backend: Backend = "auto") -> ModuleType:
    """Return the module of family ``name``, such as ``"fake_quant"``, that computes on ``x``.

    It is of ``tritonq.kernels`` for the backend "triton", ``tritonq.compiled`` for "compiled" and ``tritonq.reference``
    for "torch", where :func:`select` chooses the backend for ``x`` (and raises its errors); a family that has no C++
    takes the reference instead. While torch's profiler runs, each call of a function in it is recorded as a range such
    as ``"tritonq.fake_quant.fake_quantize (triton)"``.
    """
    return _module(select(x, backend), name)


def without_kernel(name: str, x: Tensor) -> ModuleType:
    """Return the module of family ``name``, which has no Triton kernel, that computes on ``x``.

    It is that of ``tritonq.compiled`` if ``use_backend("compiled")`` is active, ``x`` is on a CPU and the family has
    C++ code; else that of ``tritonq.reference``.
    """
    return _module("compiled" if _preferred.get() == "compiled" and x.is_cpu else "torch", name)


def _module(chosen: Chosen, name: str) -> ModuleType:
    if chosen == "compiled" and name not in _COMPILED:
        chosen = "torch"
    module = _load(chosen, name)
    # The flag is torch's own, read where it records operators; reading it costs nothing that shows.
    return _ranged(chosen, name) if profiler._is_profiler_enabled else module


@cache
def _ranged(backend: Chosen, name: str) -> ModuleType:
    """Return a copy of a family's module whose functions record a range in torch's profile."""
    module = _load(backend, name)
    copy = ModuleType(module.__name__, module.__doc__)
    for key, value in vars(module).items():
        is_operator = isinstance(value, FunctionType) and not key.startswith("_")
        setattr(copy, key, _in_range(value, f"tritonq.{name}.{key} ({backend})") if is_operator else value)
    return copy


def _in_range(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    @wraps(function)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with profiler.record_function(label):
            return function(*args, **kwargs)

    return ranged


@cache
def _load(backend: Chosen, name: str) -> ModuleType:
    return importlib.import_module(f"{_PACKAGES[backend]}.{name}")


def _require_compiler() -> None:
    """Raise RuntimeError if C++ can't be compiled here; the message has the reason."""
    from tritonq.compiled.build import obstacle

    blocked = obstacle()
    if blocked is not None:
        raise RuntimeError(f"backend 'compiled' cannot run here: {blocked}")


def _checked(backend: Backend) -> Backend:
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(get_args(Backend))}")
    return backend


def _obstacle(x: Tensor) -> str | None:
    """Return why the kernels cannot take ``x``, or None when they can."""
    if not has_triton():
        return "the triton package is not installed"
    if x.dtype not in KERNEL_DTYPES:
        return f"kernels take float32, float16, bfloat16 and 8-bit codes, got {x.dtype}"
    if not x.is_cuda and not (x.is_cpu and is_interpreting()):
        return f"kernels run on CUDA and HIP tensors, got one on {x.device}"
    return None
