"""Which kernels a piece of code launches, and in which variants; new ones are compiled and run in the emulator."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from emulator import EmulatedGpu, emulated
from tritonq import backend
from tritonq.kernels.cached_launch import Launcher

Variant = tuple[tuple[str, Any], ...]

# What says how large a launch is. Kernels are compiled for it, too, but read the same lines of code.
_SIZES = frozenset(
    {"ROWS", "COLS", "FIRST", "BLOCK", "SPLITS", "CHANNELS", "PIXELS", "OUTS", "CANDIDATES", "LENGTHS", "PER_SIDE",
     "FIRST_PREFIX", "SHIFT", "STRIDE", "PADDING", "DILATION", "KERNEL", "MULTIPLIER",
     "num_warps", "num_stages"}
)  # fmt: skip
# Families with matrix products: the emulator does not know sm_90's.
_MATRICES = frozenset({"conv2d_kernel", "int8_conv_kernel"})


def variant_of(names: list[str], args: tuple[Any, ...], constants: dict[str, Any]) -> Variant:
    """Return what a launch has in common with all those that run the same lines of a kernel on the same dtypes."""
    found = [(name, _kind(value)) for name, value in zip(names, args, strict=False)]
    found += [(name, _constant(name, value)) for name, value in constants.items() if name not in _SIZES]
    return tuple(found)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch.")
    return "none" if value is None else type(value).__name__


def _constant(name: str, value: Any) -> Any:
    if name == "CEILING":
        return value if value in (None, math.inf) else "finite"
    if name in ("COPY_ABOVE", "FIXED_ZERO_POINT"):
        return None if value is None else "given"
    if name == "WINDOW":
        return value > 0
    if name in ("QUANT_MIN", "CODE_MIN"):
        return "negative" if value < 0 else "zero"
    if name in ("QUANT_MAX", "CODE_MAX"):
        return "narrow" if value < 2**20 else "wide"
    return value


class LaunchLog:
    """Every variant of every kernel that was launched.

    A call of an operator that launches a new variant runs on kernels, in the emulator; any other runs on the PyTorch
    path, so that what follows meets the values that it would.

    Args:
        runs: False launches nothing: every call runs on the PyTorch path, and only what it would launch is noted.

    Attributes:
        variants: kernel name to its variants.
        examples: kernel name and variant to the arguments and constants of its first launch.
    """

    def __init__(self, *, runs: bool = True) -> None:
        self._runs = runs
        self.variants: dict[str, set[Variant]] = {}
        self.examples: dict[tuple[str, Variant], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._gpu = EmulatedGpu()
        # Whether each launch of a call is new, while that is found out; and whether the call runs, all its launches.
        self._found: list[bool] | None = None
        self._is_running = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, CPU tensors run kernels whose launches are new."""
        launch = Launcher._launch

        def logged(launcher: Launcher, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
            function = launcher.function
            name = f"{function.__module__.rsplit('.', 1)[-1]}.{function.__name__}"
            variants = self.variants.setdefault(name, set())
            variant = variant_of(function.arg_names, args, constants)
            self.examples.setdefault((name, variant), (args, constants))
            if not self._runs:
                variants.add(variant)
            elif self._found is not None:
                self._found.append(variant not in variants)
            elif self._is_running or variant not in variants:
                variants.add(variant)
                self._gpu.architecture = architecture_of(name)
                launch(launcher, grid, *args, **constants)

        with (
            emulated(self._gpu),
            patch.object(Launcher, "_launch", logged),
            patch.object(backend, "_load", self._load),
        ):
            yield

    def _load(self, chosen: str, family: str) -> Any:
        reference = importlib.import_module(f"tritonq.reference.{family}")
        if chosen == "torch":
            return reference
        kernels = importlib.import_module(f"tritonq.kernels.{family}")
        return SimpleNamespace(
            **{
                name: self._operator(operator, getattr(reference, name))
                for name, operator in vars(kernels).items()
                if callable(operator) and not name.startswith("_") and hasattr(reference, name)
            }
        )

    def _operator(self, run: Callable[..., Any], specify: Callable[..., Any]) -> Callable[..., Any]:
        def operator(*args: Any, **kwargs: Any) -> Any:
            if not self._launches_something_new(run, args, kwargs):
                return specify(*args, **kwargs)
            self._is_running = True
            try:
                return run(*args, **kwargs)
            finally:
                self._is_running = False

        return operator

    def _launches_something_new(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call launches a variant that has not run; nothing is launched to find out."""
        before, self._found = self._found, []
        try:
            copied, named = tree_map_only(Tensor, _copy, (args, kwargs))
            run(*copied, **named)
            return any(self._found)
        finally:
            self._found = before


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy with the tensor's strides, gaps and alignment."""
    storage = tensor.detach().untyped_storage().clone()
    copy = torch.empty(0, dtype=tensor.dtype)
    return copy.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload, no-any-return]


def architecture_of(kernel: str) -> int:
    """Return the compute capability that a kernel, named as in :func:`kernels`, is compiled for to be emulated."""
    return 80 if kernel.rpartition(".")[2] in _MATRICES else 90


def kernels() -> dict[str, Launcher]:
    """Return every kernel of the library, by name with its module."""
    package = importlib.import_module("tritonq.kernels")
    found: dict[str, Launcher] = {}
    for file in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"tritonq.kernels.{file.name}")
        for name, value in vars(module).items():
            if isinstance(value, Launcher) and value.function.__module__ == module.__name__:
                found[f"{file.name}.{name}"] = value
    return found
