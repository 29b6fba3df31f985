"""What the tuner searches for the folded convolution: shapes that stand for a class, and tiles to try against torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.functional.conv2d import find_kernel
from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.integer import IntegerAffine, integer_affine
from tritonq.functional.linear_map import Convolution
from tritonq.grid import Grid
from tritonq.kernels.conv2d import table_key
from tritonq.kernels.conv_tile import ConvGeometry, ConvTile
from tritonq.perf.case import Inputs, Step, Tolerance
from tritonq.quantized_type import QINT8
from tritonq.reference import conv2d as reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_CODES = Tolerance("sums of integers are exact in any order")
_VALUES = Tolerance("sums in another order move a few values over a tie; a missing tap is at 0.3", distance=0.02)

_PIXELS = (32, 64, 128)
_OUTS = (32, 64, 128)
_CHANNELS = (32, 64)
_WARPS = (4, 8)
_STAGES = (2, 4)
# Fewer accumulators leave lanes without work between loads; with more they spill.
_PER_LANE = range(16, 65)


@dataclass(frozen=True)
class ConvShape:
    """A square convolution: batch, in channels, size, out channels, kernel, stride, groups."""

    batch: int
    channels: int
    size: int
    outs: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def conv(self) -> Convolution:
        """Geometry of the convolution, padded so that a stride of one keeps the size."""
        stride, padding = (self.stride, self.stride), (self.kernel // 2, self.kernel // 2)
        return Convolution(stride, padding, (1, 1), (0, 0), False, self.groups)

    @property
    def x(self) -> tuple[int, int, int, int]:
        """Shape of the input."""
        return self.batch, self.channels, self.size, self.size

    @property
    def weight(self) -> tuple[int, int, int, int]:
        """Shape of the weight."""
        return self.outs, self.channels // self.groups, self.kernel, self.kernel

    def key(self, dtype: str, layout: str) -> str:
        """Return the key under which the kernel looks up its launch size for this shape."""
        return table_key(dtype, layout, self.x, self.weight, ConvGeometry(*_geometry(self.conv)))


# Of ResNet-50, ResNeXt-50 and MobileNetV2, at batches of training and of one to eight.
SHAPES = (
    *(ConvShape(32, 64, 56, 256, 1), ConvShape(32, 1024, 14, 256, 1)),
    *(ConvShape(1, 256, 56, 64, 1), ConvShape(8, 512, 7, 2048, 1)),
    *(ConvShape(32, 256, 56, 512, 1, 2), ConvShape(8, 1024, 14, 2048, 1, 2)),
    *(ConvShape(32, 64, 56, 64, 3), ConvShape(32, 256, 14, 256, 3), ConvShape(8, 512, 7, 512, 3)),
    *(ConvShape(32, 128, 56, 128, 3, 2), ConvShape(8, 512, 14, 512, 3, 2)),
    *(ConvShape(32, 3, 224, 64, 7, 2), ConvShape(1, 3, 224, 64, 7, 2), ConvShape(32, 3, 224, 32, 3, 2)),
    *(ConvShape(32, 96, 56, 96, 3, 1, 96), ConvShape(8, 576, 14, 576, 3, 1, 576)),
    *(ConvShape(32, 144, 56, 144, 3, 2, 144), ConvShape(8, 192, 28, 192, 3, 2, 192)),
    *(ConvShape(32, 128, 56, 128, 3, 1, 32), ConvShape(8, 1024, 7, 1024, 3, 1, 32)),
)


@dataclass(frozen=True)
class ConvTarget:
    """One entry of the table; its members are those of `tritonq.perf.tuning_space.Target`.

    Attributes:
        key: see `tritonq.kernels.conv2d.table_key`.
        dtype: of input and output.
        is_codes: whether integer codes are convolved.
        channels_last: layout of input and output.
        shapes: that stand for the class.
    """

    key: str
    dtype: torch.dtype
    is_codes: bool
    channels_last: bool
    shapes: tuple[ConvShape, ...]

    kernel = "conv2d"
    # What runs where the table has no entry.
    default = "torch"

    @property
    def tolerance(self) -> Tolerance:
        """How far a candidate's result may be from the specification."""
        return _CODES if self.is_codes else _VALUES

    def candidates(self) -> list[ConvTile]:
        """Return tiles worth trying."""
        if all(shape.groups == shape.channels for shape in self.shapes):
            sizes = product(_PIXELS, _OUTS, (32,), _WARPS, (1,))
        else:
            sizes = product(_PIXELS, _OUTS, _CHANNELS, _WARPS, _STAGES)
        tiles = [ConvTile(*size) for size in sizes]
        return [tile for tile in tiles if tile.pixels * tile.outs // (32 * tile.warps) in _PER_LANE]

    def make_inputs(self, shape: ConvShape, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``x`` and ``weight`` on the grids of 8-bit codes, ``bias``, and scales of weight and output."""
        codes = partial(torch.randint, -127, 128, generator=generator, device=device)
        x, weight = codes(shape.x).float() * 0.02, codes(shape.weight).float()
        spread = (shape.channels // shape.groups) ** 0.5 * shape.kernel
        inputs = {
            "x": x.to(self.dtype),
            "weight": weight if self.is_codes else (weight * 0.01).to(self.dtype),
            "bias": torch.randn(shape.outs, generator=generator, device=device).to(self.dtype),
            "scale": torch.full((1,), 0.03 * spread, device=device),
        }
        if self.channels_last:
            for name in ("x", "weight"):
                inputs[name] = inputs[name].contiguous(memory_format=torch.channels_last)
        return inputs

    def operation(self, shape: ConvShape) -> tuple[Step, Step]:
        """Return two steps: the layer in eval mode, by what the table says; and its specification."""
        run, specify = (_run_codes, _specify_codes) if self.is_codes else (_run_values, _specify_values)
        return partial(run, shape.conv), partial(specify, shape.conv)


def targets() -> Iterator[ConvTarget]:
    """Yield one target for each class of shapes in ``SHAPES``, each dtype, codes as well, and both layouts."""
    kinds = [(str(dtype).removeprefix("torch."), dtype, False) for dtype in _DTYPES]
    for (name, dtype, is_codes), channels_last in product([*kinds, ("codes", torch.float32, True)], (False, True)):
        layout = "channels_last" if channels_last else "channels_first"
        keys = {shape: shape.key(name, layout) for shape in SHAPES}
        for key in dict.fromkeys(keys.values()):
            shapes = tuple(shape for shape in SHAPES if keys[shape] == key)
            yield ConvTarget(key, dtype, is_codes, channels_last, shapes)


def _grid(inputs: Inputs) -> Grid:
    return Grid(inputs["scale"], None, QINT8)


def _quantized(y: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return (fake_quantize(F.relu(y), _grid(inputs)),)


def _run_values(conv: Convolution, inputs: Inputs) -> tuple[Tensor, ...]:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    kernel = find_kernel(x, weight, conv)
    if kernel is not None:
        return (kernel(x, weight, bias, math.inf, _grid(inputs)),)
    return _quantized(F.conv2d(x, weight, bias, *_geometry(conv)), inputs)


def _specify_values(conv: Convolution, inputs: Inputs) -> tuple[Tensor, ...]:
    x, weight, bias = (inputs[name].double() for name in ("x", "weight", "bias"))
    y = reference.conv2d(x, weight, bias, *_geometry(conv), math.inf, _grid(inputs))
    return (y.to(inputs["x"].dtype),)


def _layer(inputs: Inputs) -> IntegerAffine:
    """Return the codes in ``inputs`` as a layer of integers: input scale 0.02, weight scale 0.01, no bias."""
    weight, x = inputs["weight"], inputs["x"]
    input_scale, weight_scale = (x.new_full((1,), scale) for scale in (0.02, 0.01))
    multiplier = (input_scale * weight_scale).expand(len(weight)).contiguous()
    bound = float(127 * 127 * weight[0].numel())
    product = 127 * 127
    return IntegerAffine(weight, None, multiplier, input_scale, lambda: bound, weight_scale, None, True, product)


def _run_codes(conv: Convolution, inputs: Inputs) -> tuple[Tensor, ...]:
    x, layer, grid = inputs["x"], _layer(inputs), _grid(inputs)
    kernel = find_kernel(x, layer.weight, conv, layer)
    if kernel is not None:
        return (kernel.integers(x, layer, grid, math.inf, _grid(inputs)),)
    return _quantized(integer_affine(x, layer, conv, 1, grid).to(x.dtype), inputs)


def _specify_codes(conv: Convolution, inputs: Inputs) -> tuple[Tensor, ...]:
    layer, scale = _layer(inputs), inputs["scale"]
    codes = (inputs["x"] / layer.input_scale).round()
    end = (None, layer.multiplier / scale, _grid(inputs), inputs["x"].dtype)
    return (reference.integer_conv2d(codes, layer.weight, *end, *_geometry(conv), math.inf, _grid(inputs)),)


def _geometry(conv: Convolution) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
    stride, padding, dilation = ((rows, columns) for rows, columns in (conv.stride, conv.padding, conv.dilation))
    return stride, padding, dilation, conv.groups
