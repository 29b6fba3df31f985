"""Launch sizes: one small pure function, and a table per GPU that overrides it where someone has measured.

A table is ``kernels/tuned/<gpu>.json``, written by ``python -m tritonq tune``::

    {"version": 1, "gpu": "NVIDIA H200",
     "kernels": {"fake_quantize": {"float32/flat/large": {"elements": 4096, "max_cols": 4096, "warps": 4}},
                 "conv2d": {"float16/channels_last/3x3s1/dense/large": "torch"}}}

A *launch size* is the tile of a program and its number of warps. A key is dtype, shape class (:func:`shape_class`) and
size: ``large`` from 2^20 elements on, else ``small``. Kernels that read one row have no size in their keys
(:func:`flat_parameters`), and ``conv2d`` has keys of its own (`tritonq.kernels.conv2d.table_key`). For an operator that
torch has too, an entry may be ``"torch"``: torch's was the faster one.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, lru_cache, wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from triton.runtime.driver import driver

from .conv_tile import MAX_STAGES, ConvTile
from .layout import LaunchGrid, Tile, View, launch_grid, tile_counts, tile_shape

TABLE_VERSION = 1
TABLES = Path(__file__).parent / "tuned"

# From here on tiles of 4096 elements make at least 256 programs: one or two for each multiprocessor of a large GPU
# (H200: 132, MI300X: 304). Below it tiles are small, so that more multiprocessors work. By that count, not measured.
LARGE = 2**20


class Parameters(NamedTuple):
    """The size of a launch: what one program works on.

    Attributes:
        elements: elements per tile, a power of two.
        max_cols: widest tile, a power of two.
        warps: groups of 32 lanes per program.
    """

    elements: int
    max_cols: int
    warps: int

    def num_warps(self, warp_size: int) -> int:
        """Return Triton's ``num_warps``: ``warps`` for warps of 32 lanes, half as many, at least 1, for AMD's of 64."""
        return max(1, self.warps * 32 // warp_size)


Entry: TypeAlias = "Parameters | ConvTile | Literal['torch']"

# Kernels with entries of their own kind; all others have `Parameters`.
_ENTRY_TYPES: dict[str, type[Parameters] | type[ConvTile]] = {"conv2d": ConvTile}
# Stands for all kernels without entries of their own kind.
EVERY_KERNEL = "*"
# Kernels that torch has an operator for, which may be the faster one.
_AGAINST_TORCH = frozenset({"conv2d"})


def default_parameters(shape_class: str, size_class: str) -> Parameters:
    """Return the launch size for a shape class and a size class (``"large"`` or ``"small"``) without a table entry.

    A tile has 4096 elements, or 1024 if small, for 4 warps. For ``"cols"`` it has up to 128 columns; else a row may
    take the whole tile.

    128 lanes with 32 elements each keep 16 KiB of float32 loads in flight per program and amortise the scale's
    reciprocal. Channels along the columns take narrow, tall tiles: few reciprocals, each used for every row.
    """
    elements = 4096 if size_class == "large" else 1024
    return Parameters(elements, 128 if shape_class == "cols" else elements, 4)


def shape_class(view: View) -> str:
    """Return ``"flat"``, ``"cols"`` or ``"rows"``, the first part of a table's key after the dtype.

    ``"flat"``: one dimension and one scale. ``"cols"``: channels along the columns. ``"rows"``: any other view.
    """
    if view.channel == 2:
        return "cols"
    return "flat" if view.channel is None and view.sizes[0] == view.sizes[1] == 1 else "rows"


_OVERRIDES: ContextVar[Mapping[str, Entry]] = ContextVar("overrides", default=MappingProxyType({}))


@contextmanager
def override(kernel: str, entry: Entry) -> Iterator[None]:
    """Launch ``kernel`` with ``entry`` inside the ``with`` block, whatever the GPU's table has.

    Blocks nest, and the innermost that counts for a kernel wins, be it for this kernel or for all. A block counts only
    in the thread that runs it.

    Args:
        kernel: the kernel's name in tables, or :data:`EVERY_KERNEL` for all kernels whose entries are
            :class:`Parameters`, that is all but ``"conv2d"``.
        entry: :class:`Parameters`; for ``"conv2d"`` a ``ConvTile``, or ``"torch"`` for torch's operator. Not checked.
    """
    outer = _OVERRIDES.get()
    if kernel == EVERY_KERNEL:
        outer = {name: held for name, held in outer.items() if name in _ENTRY_TYPES}
    token = _OVERRIDES.set(MappingProxyType({**outer, kernel: entry}))
    try:
        yield
    finally:
        _OVERRIDES.reset(token)


def overridden(kernel: str) -> Entry | None:
    """Return the entry that the innermost :func:`override` block for ``kernel`` gives it; None without such a block.

    A block for :data:`EVERY_KERNEL` counts for all kernels but ``"conv2d"``, whose entries are tiles of another kind.
    """
    overrides = _OVERRIDES.get()
    if not overrides:
        return None
    everywhere = None if kernel in _ENTRY_TYPES else overrides.get(EVERY_KERNEL)
    return overrides.get(kernel, everywhere)


def planned(kernel: str) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that caches a function's results by its arguments and the launch sizes set for ``kernel``.

    Those are what an enclosing :func:`override` block sets; without one, the key is the arguments alone. The decorated
    function takes hashable, positional arguments, and has ``cache_clear`` as those of :func:`functools.lru_cache`.
    """

    def remember(function: Callable[..., Any]) -> Any:
        @lru_cache(maxsize=4096)
        def plans(override: Entry | None, *arguments: Any) -> Any:
            return function(*arguments)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return plans(overridden(kernel), *arguments)

        call.cache_clear = plans.cache_clear  # type: ignore[attr-defined]
        return call

    return remember


def parameters(kernel: str, dtype: torch.dtype, view: View, device: torch.device) -> Parameters:
    """Return the launch size of ``kernel`` for a view: of :func:`override`, else of the GPU's table, else the default.

    Args:
        kernel: its name in tables; not ``"conv2d"``, which alone has entries of another kind, such as ``"torch"``.
        dtype: of the tensor that is read.
        view: of the tensors.
        device: that of the tensors; only ``cuda`` devices have tables.
    """
    size_class = "large" if view.numel >= LARGE else "small"
    index = device.index if device.type == "cuda" else None
    override = overridden(kernel)
    if override is None:
        return _parameters(kernel, dtype, shape_class(view), size_class, index)
    return override if isinstance(override, Parameters) else default_parameters(shape_class(view), size_class)


@cache
def _parameters(
    kernel: str, dtype: torch.dtype, shape_class: str, size_class: str, device_index: int | None
) -> Parameters:
    entry = _in_table(kernel, f"{str(dtype).removeprefix('torch.')}/{shape_class}/{size_class}", device_index)
    return entry if isinstance(entry, Parameters) else default_parameters(shape_class, size_class)


def tuned(kernel: str, key: str, device_index: int | None) -> Entry | None:
    """Return what an enclosing :func:`override` block gives ``kernel``, else its entry in the GPU's table, else None.

    Args:
        kernel: its name in tables.
        key: of the entry in the table, such as ``"float32/flat/large"``.
        device_index: of the GPU; None: there is none, and no table.
    """
    override = overridden(kernel)
    return _in_table(kernel, key, device_index) if override is None else override


def _in_table(kernel: str, key: str, device_index: int | None) -> Entry | None:
    if device_index is None:
        return None
    table = load_table(TABLES / f"{gpu_file_stem(torch.cuda.get_device_name(device_index))}.json")
    return table.get(kernel, {}).get(key)


def gpu_file_stem(name: str) -> str:
    """Return the file name of a GPU's table, without suffix: ``"NVIDIA H200"`` gives ``"nvidia_h200"``.

    It is the name in lower case, in which one underscore replaces each run of characters other than a-z and 0-9, and
    none stands at its ends.
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@cache
def load_table(path: Path) -> dict[str, dict[str, Entry]]:
    """Read a table of launch sizes and return its entries as ``{kernel: {key: entry}}``.

    Without the file the result is empty; so it is, with a UserWarning, if the file can't be read, has another version
    or an invalid entry. Files are read once per process, and callers share the result: do not change it.
    """
    if not path.exists():
        return {}
    try:
        return _checked_table(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"ignoring the damaged table of launch sizes {path.name}: {error!r}", stacklevel=2)
        return {}


def _checked_table(content: dict[str, Any]) -> dict[str, dict[str, Entry]]:
    if content["version"] != TABLE_VERSION:
        raise ValueError(f"version {content['version']!r}, expected {TABLE_VERSION}")
    return {
        kernel: {key: _checked_entry(kernel, key, value) for key, value in entries.items()}
        for kernel, entries in content["kernels"].items()
    }


def _checked_entry(kernel: str, key: str, value: Any) -> Entry:
    if value == "torch" and kernel in _AGAINST_TORCH:
        return "torch"
    entry = _ENTRY_TYPES.get(kernel, Parameters)(**value)
    for name, size in entry._asdict().items():
        whole = isinstance(size, int) and size >= 1
        if name == "stages":
            if not whole or size > MAX_STAGES:
                raise ValueError(f"{kernel} {key}: stages must be in 1..{MAX_STAGES}, got {size!r}")
        elif not whole or size & (size - 1):
            raise ValueError(f"{kernel} {key}: {name} must be a power of two, got {size!r}")
    return entry


def flat_parameters(kernel: str, x: Tensor, default: Parameters) -> Parameters:
    """Return the launch size of a ``kernel`` that reads ``x`` as one row.

    What an enclosing :func:`override` block sets comes first, then the GPU's table, then ``default``. An entry replaces
    ``default`` as a whole; one that is no :class:`Parameters`, such as ``"torch"``, gives ``default``.

    Args:
        kernel: its name in tables. The key there has no size class: ``"float32/flat"``.
        x: the tensor, of which only dtype and device are read.
        default: the launch size without such a block and without an entry in the table.
    """
    key = f"{str(x.dtype).removeprefix('torch.')}/flat"
    entry = tuned(kernel, key, x.device.index if x.device.type == "cuda" else None)
    return entry if isinstance(entry, Parameters) else default


# What is assumed where there is no GPU to ask: an H200's.
_DEFAULT_MULTIPROCESSORS = 132


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors (AMD: compute units) of a GPU; 132, an H200's, for other devices."""
    if device.type != "cuda":
        return _DEFAULT_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# Enough for every multiprocessor to hide the latency of its loads. By count, not measured.
_PROGRAMS_PER_MULTIPROCESSOR = 4


def programs_that_fill(device: torch.device) -> int:
    """Return how many programs of a reduction keep the device busy: 4 per multiprocessor.

    A device that is no GPU counts as 132 multiprocessors. More programs would only make more partial results to join.
    """
    return _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device)


def warp_size(device: torch.device) -> int:
    """Return the lanes per warp: 32, or 64 for an AMD GPU; for the meta device those of the GPU Triton compiles for."""
    if device.type == "meta":
        return int(driver.active.get_current_target().warp_size)
    return 64 if device.type == "cuda" and torch.version.hip else 32


class LaunchPlan(NamedTuple):
    """The size of a launch with one program per tile of a view.

    Attributes:
        tile: what one program works on, and its number of warps.
        grid: how many programs there are along each axis of the launch, and the view's dimension on the first axis.
    """

    tile: Tile
    grid: LaunchGrid


def plan(kernel: str, dtype: torch.dtype, view: View, device: torch.device) -> LaunchPlan:
    """Return tile and number of programs for a ``kernel`` with one program per tile of ``view``.

    ``kernel`` is its name in tables, ``dtype`` that of the tensor that is read, ``device`` that of the tensors.
    """
    return _plan(overridden(kernel), kernel, dtype, view, device, warp_size(device))


@lru_cache(maxsize=4096)
def _plan(
    override: Entry | None, kernel: str, dtype: torch.dtype, view: View, device: torch.device, warp_size: int
) -> LaunchPlan:
    chosen = parameters(kernel, dtype, view, device)
    rows, cols = tile_shape(view.sizes, chosen.elements, chosen.max_cols)
    return LaunchPlan(Tile(rows, cols, chosen.num_warps(warp_size)), launch_grid(tile_counts(view.sizes, rows, cols)))


def device_guard(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which ``x``'s GPU is torch's current device, on which Triton launches.

    For a tensor on any other device it does nothing.
    """
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
