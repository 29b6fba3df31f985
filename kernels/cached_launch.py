"""Launches that remember the compiled kernel: a second launch with the same arguments skips Triton's look-up.

Triton finds the compiled kernel of a launch by inspecting every argument anew. For a small kernel this takes Python
longer than the GPU computes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from .architectures import warn_if_untested

# Triton compiles another kernel where a pointer is not a multiple of this many bytes.
_ALIGNMENT = 16
# Shapes that change without end shall not fill the memory.
_MAX_ENTRIES = 4096


class _Entry(NamedTuple):
    """A launch that was compiled before.

    Attributes:
        kernel: the compiled kernel.
        constants: values of the constants that the kernel takes, in the order of its signature.
    """

    kernel: CompiledKernel
    constants: tuple[Any, ...]


class Launcher:
    """A decorator for jitted functions: ``launcher[grid](*args, **constants)`` launches as the plain function would.

    A launch is remembered by device, dtypes of tensors, and the values of all other arguments. Triton's own look-up is
    used each time for pointers that are not aligned to 16 bytes, for tensors on a CPU (interpreter), and for tensors
    without memory (compilation for an absent GPU).

    ``grid`` is a tuple of one to three numbers of programs. Positional arguments (tensors, sizes) come first; all
    parameters behind them are keyword arguments and must be given, even those with a default: a launch without them
    raises TypeError. Triton's options, such as ``num_warps``, are optional keyword arguments. A launch returns None.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._entries: dict[tuple[Any, ...], _Entry] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> partial[None]:
        return partial(self._launch, (*grid, 1, 1)[:3])

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        key = _key(args, constants)
        entry = None if key is None else self._entries.get(key)
        if entry is not None:
            entry.kernel[grid](*args, *entry.constants)
            return
        # Options such as num_warps are no parameters: they go into the compiled kernel.
        names = self.function.arg_names[len(args) :]
        missing = [name for name in names if name not in constants]
        if missing:
            raise TypeError(f"{self.function.fn.__name__} must be given {', '.join(missing)}, defaults or not")
        kernel = self.function[grid](*args, **constants)
        if key is not None:
            if torch.cuda.is_initialized():
                target = driver.active.get_current_target()
                warn_if_untested(f"{target.backend}:{target.arch}")
            if len(self._entries) >= _MAX_ENTRIES:
                self._entries.clear()
            self._entries[key] = _Entry(kernel, tuple(constants[name] for name in names))


def _key(args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return what identifies the compiled kernel of a call; None if the call must go through Triton.

    That is so if a tensor is not on a GPU, or its address is not a multiple of 16 bytes.
    """
    key: list[Any] = []
    for value in args:
        if isinstance(value, Tensor):
            if not has_launches(value) or value.data_ptr() % _ALIGNMENT:
                return None
            key.append(value.dtype)
        else:
            key.append(value)
            # 0 and 0.0 are equal, and Triton compiles another kernel for each.
            key.append(type(value))
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    return device, *key, *constants, *constants.values()


def has_launches(value: Tensor) -> bool:
    """Whether ``value`` lies on a GPU (NVIDIA or AMD), where kernels are launched; False for CPU and meta tensors."""
    return value.is_cuda
