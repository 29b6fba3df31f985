"""Code-generation cases of fixed point: the search for a fractional length."""

from __future__ import annotations

import torch

from tritonq.kernels import fixed_point
from tritonq.perf.codegen_case import CodegenCase, meta
from tritonq.quantized_type import QINT8_NARROW, QUINT8


def _search(dtype: torch.dtype) -> object:
    return fixed_point.frac_len_errors(meta(64, 64, 56, 56, dtype=dtype), QUINT8, 9)


def _search_weights(dtype: torch.dtype) -> object:
    return fixed_point.frac_len_errors(meta(512, 512, 3, 3, dtype=dtype), QINT8_NARROW.with_axis(0), 8)


CASES = (
    CodegenCase("frac_len_errors/flat", _search, "frac_len_errors_kernel", 1, 0, "nine candidates"),
    CodegenCase("frac_len_errors/weight", _search_weights, "frac_len_errors_kernel", 1, 0, "nine candidates"),
)
