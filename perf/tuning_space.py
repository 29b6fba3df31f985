"""What the tuner searches: kernels, the inputs that stand for a shape class, and candidate launch parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tritonq.grid import Grid
from tritonq.kernels.launch_sizes import Parameters, default_parameters, shape_class
from tritonq.kernels.layout import dense_view
from tritonq.perf.case import Inputs, Step, Tolerance
from tritonq.quantized_type import QuantizedType

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_QUANT_MIN, _QUANT_MAX = -128, 127
_EXACT = Tolerance("tiles change where elements are computed, not how")

# Below 512 elements a program is all prologue; above 16384 its registers spill.
_ELEMENTS = (512, 1024, 2048, 4096, 8192, 16384)
_MAX_COLS = (64, 128, 256, 512)
_WARPS = (1, 2, 4, 8)
# A lane with fewer elements than one 16-byte access of two-byte values wastes loads; with more than 64 it spills.
_ELEMENTS_PER_LANE = range(4, 65)


@dataclass(frozen=True)
class Shape:
    """The shape of an input, and the axis of its scales."""

    sizes: tuple[int, ...]
    axis: int | None
    channels_last: bool = False

    def tensor(self, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Tensor:
        """Return a tensor of normal values, of which some lie outside of the grid's range."""
        values = torch.randn(self.sizes, generator=generator, device=device).to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values

    def shape_class(self) -> str:
        """Return the class to which the kernels assign this shape, such as "flat"."""
        strides = self.tensor(torch.float32, torch.Generator(), torch.device("meta")).stride()
        return shape_class(dense_view(self.sizes, (strides,), self.axis))


@dataclass(frozen=True)
class Target:
    """One entry of the table: a kernel, and the class of inputs that its parameters are chosen for.

    Attributes:
        kernel: its name in the table.
        key: ``dtype/shape class/size class``, as the kernels look it up.
        shapes: the inputs that stand for the class; candidates are ranked by the mean over them.
        operation: builds the step that launches the kernel, and the step that specifies it.
        tolerance: how far a candidate may be from the specification.
    """

    kernel: str
    key: str
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    operation: Callable[[Shape], tuple[Step, Step]]
    tolerance: Tolerance = _EXACT

    @property
    def default(self) -> Parameters:
        """The launch parameters if the table has no entry."""
        _, shapes_class, size_class = self.key.split("/")
        return default_parameters(shapes_class, size_class)

    def candidates(self) -> list[Parameters]:
        """Return the launch parameters to try."""
        return candidates(self.key.split("/")[1])

    def make_inputs(self, shape: Shape, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``x``, ``dy``, ``scale`` and ``zero_point`` for one of the shapes."""
        channels = 1 if shape.axis is None else shape.sizes[shape.axis]
        return {
            "x": shape.tensor(self.dtype, generator, device),
            "dy": shape.tensor(self.dtype, generator, device),
            "scale": 0.02 + 0.01 * torch.rand(channels, generator=generator, device=device),
            "zero_point": torch.randint(-5, 5, (channels,), generator=generator, device=device).int(),
        }


def targets() -> Iterator[Target]:
    """Yield fake quantization, its backward and minimum and maximum, in every dtype, shape class and size class."""
    for (kernel, operation), dtype in product(_KERNELS.items(), _DTYPES):
        for (shapes_class, size_class), shapes in _SHAPES.items():
            key = f"{str(dtype).removeprefix('torch.')}/{shapes_class}/{size_class}"
            yield Target(kernel, key, dtype, shapes, operation)


def candidates(shapes_class: str) -> list[Parameters]:
    """Return the launch parameters to try for a class of shapes; narrow tiles are left out for flat ones."""
    found = []
    for elements, warps in product(_ELEMENTS, _WARPS):
        if elements // (32 * warps) not in _ELEMENTS_PER_LANE:
            continue
        widths = {elements} if shapes_class == "flat" else {*(w for w in _MAX_COLS if w < elements), elements}
        found += [Parameters(elements=elements, max_cols=width, warps=warps) for width in sorted(widths)]
    return found


def _fake_quantize(shape: Shape) -> tuple[Step, Step]:
    def run(implementation: str, inputs: Inputs) -> tuple[Tensor, ...]:
        operation = _implementation(implementation, "fake_quant").fake_quantize
        return (operation(inputs["x"], _grid(inputs, shape)),)

    return partial(run, "kernels"), partial(run, "reference")


def _fake_quantize_backward(shape: Shape) -> tuple[Step, Step]:
    def run(implementation: str, inputs: Inputs) -> tuple[Tensor, ...]:
        operation = _implementation(implementation, "fake_quant").fake_quantize_backward
        return (operation(inputs["dy"], inputs["x"], _grid(inputs, shape)),)

    return partial(run, "kernels"), partial(run, "reference")


def _grid(inputs: Inputs, shape: Shape) -> Grid:
    qtype = QuantizedType(_QUANT_MIN, _QUANT_MAX, symmetric=False, axis=shape.axis)
    return Grid(inputs["scale"], inputs["zero_point"], qtype)


def _min_max(shape: Shape) -> tuple[Step, Step]:
    def run(implementation: str, inputs: Inputs) -> tuple[Tensor, ...]:
        low, high, _ = _implementation(implementation, "min_max").min_max(inputs["x"], shape.axis)
        return low, high

    return partial(run, "kernels"), partial(run, "reference")


def _implementation(package: str, family: str) -> Any:
    from importlib import import_module

    return import_module(f"tritonq.{package}.{family}")


_KERNELS: dict[str, Callable[[Shape], tuple[Step, Step]]] = {
    "fake_quantize": _fake_quantize,
    "fake_quantize_backward": _fake_quantize_backward,
    "min_max": _min_max,
}

# From 2^20 elements on an input is large. Activations of ResNet's first and last stage, and weights.
_SHAPES: dict[tuple[str, str], tuple[Shape, ...]] = {
    ("flat", "small"): (Shape((64, 64), None), Shape((16, 64, 24, 24), None)),
    ("flat", "large"): (Shape((256, 64, 56, 56), None), Shape((32, 256, 14, 14), None)),
    ("rows", "small"): (Shape((64, 3, 7, 7), 0), Shape((128, 128, 3, 3), 0), Shape((16, 64, 24, 24), 1)),
    ("rows", "large"): (
        Shape((512, 512, 3, 3), 0),
        Shape((2048, 512, 1, 1), 0),
        Shape((256, 64, 56, 56), 1),
        Shape((256, 2048, 7, 7), 1),
    ),
    ("cols", "small"): (Shape((16, 64, 24, 24), 1, channels_last=True), Shape((4, 512, 7, 7), 1, channels_last=True)),
    ("cols", "large"): (
        Shape((256, 64, 56, 56), 1, channels_last=True),
        Shape((256, 2048, 7, 7), 1, channels_last=True),
    ),
}
