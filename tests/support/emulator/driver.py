"""The emulator behind Triton's driver: ordinary launches of compiled kernels take CPU tensors."""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

from emulator.faults import EmulatorError
from emulator.launch import run
from emulator.memory import GlobalMemory
from emulator.ptx import Program
from emulator.threads import Launch
from tritonq import backend
from tritonq.kernels import cached_launch

WARP_SIZE = 32
# Of an H100 and an H200, as are the limits of a grid.
_SHARED_BYTES = 232448
_GRID_LIMITS = (2**31 - 1, 65535, 65535)
# No number that is not an address is as large in these kernels.
_SMALLEST_ADDRESS = 2**32
# Pointers that Triton adds to a kernel's arguments: scratch memory that none of these kernels uses.
_ADDED_PARAMETERS = 2


class EmulatedGpu:
    """Stands in for Triton's driver.

    Attributes:
        architecture: compute capability that kernels are compiled for: 90, or 80 for those with matrix products.
        launches: how often each kernel ran.
        check_races: whether races are looked for.
    """

    def __init__(self, architecture: int = 90, *, check_races: bool = True) -> None:
        self.architecture, self.check_races = architecture, check_races
        self.launches: Counter[str] = Counter()
        # Triton asks the driver for its utilities.
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, WARP_SIZE)

    def get_current_device(self) -> int:
        # Triton keys its compiled kernels by this.
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_BYTES}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Program, int, int, int]:
        """Return module, function, registers, spills and most threads; the function is the parsed PTX."""
        return object(), Program.parse(binary.decode()), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return the function that Triton launches a compiled kernel by."""
        types = tuple(source.signature.items())

        def launch(
            x: int,
            y: int,
            z: int,
            stream: Any,
            program: Program,
            packed: Any,
            made: Any,
            enter: Any,
            leave: Any,
            *args: Any,
        ) -> None:
            grid = (x, y, z)
            if any(size > limit for size, limit in zip(grid, _GRID_LIMITS, strict=True)):
                raise EmulatorError(f"{program.name}: grid {grid}")
            values, memory = _arguments(types, args)
            missing = len(program.parameters) - len(values)
            if not 0 <= missing <= _ADDED_PARAMETERS:
                raise EmulatorError(f"{program.name}: {len(program.parameters)} parameters, {len(values)} arguments")
            self.launches[program.name] += 1
            if 0 in grid:
                return
            parameters = dict(zip(program.parameters, [*values, *[0] * missing], strict=True))
            run(Launch(program, grid, parameters, metadata.shared, memory), check_races=self.check_races)

        return launch


@contextmanager
def compiled_for(gpu: EmulatedGpu) -> Iterator[EmulatedGpu]:
    """Inside, launches of kernels are compiled for ``gpu``, and emulated."""
    before = driver._active
    driver.set_active(gpu)
    try:
        with (
            patch.object(CUDABackend, "make_cubin", lambda self, ptx, *rest: ptx.encode()),
            # Triton's cache on disk is keyed by this: what is compiled for the emulator has no machine code.
            patch.object(CUDABackend, "hash", lambda self: f"emulated-{self.target.arch}"),
        ):
            yield gpu
    finally:
        driver._active = before


@contextmanager
def emulated(gpu: EmulatedGpu) -> Iterator[EmulatedGpu]:
    """Inside, CPU tensors run kernels, compiled for ``gpu`` and emulated."""
    with (
        compiled_for(gpu),
        patch.object(backend, "is_interpreting", lambda: True),
        patch.object(cached_launch, "has_launches", lambda value: not value.is_meta),
    ):
        yield gpu


def _arguments(types: tuple[tuple[str, Any], ...], args: tuple[Any, ...]) -> tuple[list[int], GlobalMemory]:
    """Return words of the arguments that are passed, and the memory that they lead to."""
    if len(args) != len(types):
        raise EmulatorError(f"{len(args)} arguments for {len(types)} of the signature")
    memory, values = GlobalMemory(), []
    for name, type_name, value in _flat(types, args):
        if type_name == "constexpr":
            continue
        if type_name[0] == "*":
            values.append(0 if value is None else value.data_ptr())
            if value is not None:
                _add(memory, value)
                _add_what_it_points_to(memory, value)
        else:
            values.append(_number(name, type_name, value))
    return values, memory


def _flat(types: tuple[tuple[str, Any], ...], args: tuple[Any, ...]) -> Iterator[tuple[str, str, Any]]:
    """Name, type and value of each argument; those of a tuple one by one, as Triton passes them."""
    for (name, type_name), value in zip(types, args, strict=True):
        if isinstance(type_name, tuple):
            yield from _flat(tuple((f"{name}[{i}]", part) for i, part in enumerate(type_name)), value)
        else:
            yield name, type_name, value


def _add(memory: GlobalMemory, tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    memory.add(storage.data_ptr(), storage.nbytes())


def _add_what_it_points_to(memory: GlobalMemory, table: Tensor) -> None:
    """Add the tensors whose addresses a table of int64 holds."""
    if table.dtype != torch.int64 or not table.is_contiguous():
        return
    addresses = np.ctypeslib.as_array((ctypes.c_int64 * table.numel()).from_address(table.data_ptr()))
    if not (addresses >= _SMALLEST_ADDRESS).any():
        return
    for found in gc.get_objects():
        # By type: isinstance asks proxies for what they stand for, and an uninitialized parameter has no storage.
        if type(found) in (Tensor, Parameter) and not found.is_meta and found.layout == torch.strided:
            storage = found.untyped_storage()
            start = storage.data_ptr()
            if ((addresses >= start) & (addresses < start + storage.nbytes())).any():
                memory.add(start, storage.nbytes())


def _number(name: str, type_name: str, value: Any) -> int:
    """Return the word of a number that is passed."""
    if type_name in ("fp32", "fp64"):
        if not isinstance(value, int | float):
            raise EmulatorError(f"{name}: {value!r} for {type_name}")
        return int(np.float32(value).view(np.uint32) if type_name == "fp32" else np.float64(value).view(np.uint64))
    bits, signed = int(type_name[1:]), type_name[0] == "i"
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed and bits > 1 else (0, 2**bits - 1)
    if not isinstance(value, int) or not least <= value <= most:
        raise EmulatorError(f"{name}: {value!r} for {type_name}")
    return value % (1 << max(bits, 8))
