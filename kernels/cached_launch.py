"""Launches that remember what they compiled: the second launch with the same arguments asks Triton nothing.

Triton finds the compiled kernel of a launch by specializing every argument anew, which takes Python longer than a GPU
takes for a small kernel.
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
        constants: its keyword arguments, in the order of its signature.
    """

    kernel: CompiledKernel
    constants: tuple[Any, ...]


class Launcher:
    """A kernel that is launched as ``launcher[grid](*args, **constants)``, exactly as the function it decorates.

    A launch is remembered by device, dtypes and all values that are not tensors. Pointers that are not aligned, tensors
    on a CPU (interpreter) or without memory (compilation for an absent GPU) go through Triton every time. Tensors are
    positional arguments. Has launched nothing on a GPU yet: what it hands to Triton's own launcher is tested.
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
        kernel = self.function[grid](*args, **constants)
        if key is not None:
            if torch.cuda.is_initialized():
                target = driver.active.get_current_target()
                warn_if_untested(f"{target.backend}:{target.arch}")
            if len(self._entries) >= _MAX_ENTRIES:
                self._entries.clear()
            # Options such as num_warps are no parameters: they went into the compiled kernel.
            names = self.function.arg_names[len(args) :]
            self._entries[key] = _Entry(kernel, tuple(constants[name] for name in names))


def _key(args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return the key of the compiled kernel that a call runs; None: an argument has no launch, or is not aligned."""
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
    """Whether kernels on ``value`` are compiled and launched, not interpreted."""
    return value.is_cuda
