"""Code-generation cases of results that are observed and rounded."""

from __future__ import annotations

import torch

from tritonq.kernels import rounded
from tritonq.perf.codegen_case import CodegenCase, meta, meta_grid, meta_range
from tritonq.quantized_type import QUINT8

# ResNet-50's second stage; rows of 56 * 56, which no tile divides.
_ACTIVATION = (256, 64, 56, 56)


def _rounded(dtype: torch.dtype) -> object:
    return rounded.forward(meta(*_ACTIVATION, dtype=dtype), meta_grid(QUINT8), meta_range(QUINT8), None)


CASES = (
    CodegenCase("rounded", _rounded, "rounded_kernel", 1, 1, "one read, one write", (torch.float32,)),
    CodegenCase("rounded_range", _rounded, "rounded_range_kernel", 1, 0, "one read", (torch.float32,)),
)
