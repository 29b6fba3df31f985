"""A tensor as one-byte codes and back, in C++: `tritonq.reference.input_codes` in one pass each way."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype
from tritonq.compiled.arguments import are_vectors, is_plain, reciprocal
from tritonq.compiled.build import library
from tritonq.grid import Grid
from tritonq.reference import input_codes as reference
from tritonq.reference.input_codes import InputCodes, shift_of
from tritonq.reference.scratch import is_dense


def encode(x: Tensor, grid: Grid, trusted: bool) -> InputCodes | None:
    """Compute :func:`tritonq.reference.input_codes.encode` in C++: the codes of ``x``, or None if not exact."""
    if not (is_plain(x) and is_dense(x) and are_vectors(grid.scale)):
        return reference.encode(x, grid, trusted)
    scale, shift = grid.scale.clone(), shift_of(grid)
    codes, step = torch.empty_like(x, dtype=torch.int8), float(scale)
    numbers = (reciprocal(step), step, 0.0 if shift is None else float(shift))
    exact = library().codes_of_values(x.data_ptr(), x.numel(), *numbers, not trusted, codes.data_ptr())
    return InputCodes(codes, scale, shift) if exact else None


def decode(codes: InputCodes, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Compute :func:`tritonq.reference.input_codes.decode` in C++: the tensor that the codes stand for."""
    held = codes.codes
    if not (held.is_cpu and is_dense(held) and are_vectors(codes.scale) and is_plain(out)):
        return reference.decode(codes, dtype, out)
    x = torch.empty_like(held, dtype=torch.float32) if out is None else out
    shift = 0.0 if codes.shift is None else float(codes.shift)
    library().values_of_codes(held.data_ptr(), held.numel(), float(codes.scale), shift, x.data_ptr())
    return as_dtype(x, dtype)
