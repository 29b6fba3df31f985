"""Code-generation cases of folded weights: float32 and small, so that they are checked for spills alone."""

from __future__ import annotations

import torch

from tritonq.kernels import weight
from tritonq.perf.codegen_case import Call, CodegenCase, meta, meta_grid, meta_range
from tritonq.quantized_type import QINT8, QINT8_NARROW, QUINT8, QuantizedType

# Elements per row, and the type: a 3×3, a 1×1 and a depthwise convolution, and rows longer than a tile.
WEIGHTS = {"3x3": (4608, QINT8_NARROW), "1x1": (64, QINT8), "depthwise": (9, QINT8), "long": (18432, QUINT8)}


def _forward(length: int, qtype: QuantizedType) -> Call:
    def call(dtype: torch.dtype) -> object:
        rows = meta(512, length, dtype=dtype)
        return weight.quantize_folded(rows, meta(512), meta_grid(qtype, 512), meta_range(qtype, 512))

    return call


def _backward(length: int, qtype: QuantizedType) -> Call:
    def call(dtype: torch.dtype) -> object:
        rows, grid = meta(512, length, dtype=dtype), meta_grid(qtype, 512)
        per_row = grid.with_buffers(grid.scale, grid.zero_point, meta(512, dtype=torch.uint8))
        return weight.folded_backward(rows, rows, meta(512), meta(512), per_row, True)

    return call


CASES = tuple(
    CodegenCase(f"{name}/{kind}", make(length, qtype.with_axis(0)), dtypes=(torch.float32,))
    for kind, (length, qtype) in WEIGHTS.items()
    for name, make in (("weight", _forward), ("weight_backward", _backward))
)
