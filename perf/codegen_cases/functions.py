"""Code-generation cases of functions of one tensor: products alone, an exponential, a clip."""

from __future__ import annotations

from functools import partial

import torch

from tritonq.kernels import functions
from tritonq.perf.codegen_case import CodegenCase, meta, meta_grid, meta_range
from tritonq.quantized_type import QUINT8
from tritonq.reference.functions import Function

# MobileNetV3's widest activation, expanded, at batch 256.
_ACTIVATION = (256, 64, 112, 112)


def _forward(function: Function, dtype: torch.dtype) -> object:
    x = meta(*_ACTIVATION, dtype=dtype)
    return functions.forward(x, function, meta_grid(QUINT8), meta_range(QUINT8))


def _backward(function: Function, dtype: torch.dtype) -> object:
    x = meta(*_ACTIVATION, dtype=dtype)
    return functions.backward(x, x, None, None, function, meta_grid(QUINT8))


def _backward_of_codes(function: Function, dtype: torch.dtype) -> object:
    dy, codes = meta(*_ACTIVATION, dtype=dtype), meta(*_ACTIVATION, dtype=torch.int8)
    return functions.backward(dy, codes, meta(1), meta(1), function, meta_grid(QUINT8))


_FUNCTIONS = (Function("hardswish"), Function("silu"), Function("clip", (-1.0, 1.0)))
_BUDGET = "function of one tensor"
_BACKWARD_BUDGET = f"{_BUDGET}, backward"
CASES = (
    *(
        CodegenCase(f"functions/{function.name}", partial(_forward, function), "rounded_kernel", 1, 1, _BUDGET)
        for function in _FUNCTIONS
    ),
    *(
        CodegenCase(
            f"functions_backward/{function.name}",
            partial(_backward, function),
            "function_backward_kernel",
            2,
            1,
            _BACKWARD_BUDGET,
        )
        for function in _FUNCTIONS
    ),
    # Reads a byte per element beside the gradient, by accesses narrower than 128 bits: only spills are checked.
    CodegenCase("functions_backward/codes", partial(_backward_of_codes, Function("silu"))),
)
