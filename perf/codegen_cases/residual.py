"""Code-generation cases of the residual join."""

from __future__ import annotations

import torch

from tritonq.kernels import residual
from tritonq.perf.codegen_case import CodegenCase, meta, meta_grid, meta_range
from tritonq.quantized_type import QINT8

# ResNet-50's second stage; rows of 56 * 56, which no tile divides.
_ACTIVATION = (256, 64, 56, 56)
# Of ReLU6: a plain ReLU compiles to less.
_CEILING = 6.0


def _join(dtype: torch.dtype) -> object:
    a = meta(*_ACTIVATION, dtype=dtype)
    return residual.forward(a, a, meta_grid(QINT8), meta_range(QINT8), _CEILING)


def _join_backward(dtype: torch.dtype) -> object:
    a = meta(*_ACTIVATION, dtype=dtype)
    return residual.backward(a, meta(a.numel() // 8, dtype=torch.uint8))


CASES = (
    CodegenCase("residual", _join, "rounded_kernel", 2, 1, "two reads, one write, two sums"),
    CodegenCase("residual_range", _join, "rounded_range_kernel", 2, 0, "one read, one write"),
    CodegenCase("residual_backward", _join_backward, "join_backward_kernel", 1, 1, "one read, one write"),
)
