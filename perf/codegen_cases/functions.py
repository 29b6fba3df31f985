"""Code-generation cases of functions of one tensor: one of products alone, and one with an exponential."""

from __future__ import annotations

from functools import partial

import torch

from tritonq.kernels import functions
from tritonq.perf.codegen_case import CodegenCase, meta, meta_grid, meta_range
from tritonq.qparams import QUINT8
from tritonq.reference.functions import Function

# MobileNetV3's widest activation, expanded, at batch 256.
_ACTIVATION = (256, 64, 112, 112)


def _forward(name: str, dtype: torch.dtype) -> object:
    x = meta(*_ACTIVATION, dtype=dtype)
    return functions.forward(x, Function(name), meta_grid(QUINT8), meta_range(QUINT8))


def _backward(name: str, dtype: torch.dtype) -> object:
    x = meta(*_ACTIVATION, dtype=dtype)
    return functions.backward(x, x, None, None, Function(name), meta_grid(QUINT8))


def _backward_of_codes(name: str, dtype: torch.dtype) -> object:
    dy, codes = meta(*_ACTIVATION, dtype=dtype), meta(*_ACTIVATION, dtype=torch.int8)
    return functions.backward(dy, codes, meta(1), meta(1), Function(name), meta_grid(QUINT8))


_FUNCTIONS = ("hardswish", "silu")
_BUDGET = "function of one tensor"
_BACKWARD_BUDGET = f"{_BUDGET}, backward"
CASES = (
    *(
        CodegenCase(f"functions/{name}", partial(_forward, name), "rounded_kernel", 1, 1, _BUDGET)
        for name in _FUNCTIONS
    ),
    *(
        CodegenCase(
            f"functions_backward/{name}", partial(_backward, name), "function_backward_kernel", 2, 1, _BACKWARD_BUDGET
        )
        for name in _FUNCTIONS
    ),
    # Reads a byte per element beside the gradient, by accesses narrower than 128 bits: only spills are checked.
    CodegenCase("functions_backward/codes", partial(_backward_of_codes, "silu")),
)
