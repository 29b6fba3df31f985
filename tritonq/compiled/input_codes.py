"""A tensor as one-byte codes and back, in C++, in one pass each way: what a backward keeps of an operator's input.

An :class:`~tritonq.reference.input_codes.InputCodes` has ``codes``, int8, ``scale``, and ``shift``: the zero point (0
without one) minus the code that is stored as 0, so that all fit int8. None counts as 0. The tensor is
``(codes - shift) · scale``.
"""

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
    """Return int8 codes ``round(x / scale) + shift``, scale and shift, or None if they can't give ``x`` back exactly.

    Args:
        x: float32, float16 or bfloat16, any shape.
        grid: per tensor, with at most 256 codes.
        trusted: whether ``x`` is known to lie on the grid; then the result is never None. If it is False, the rebuilt
            values must equal ``x``.
    """
    if not (is_plain(x) and is_dense(x) and are_vectors(grid.scale)):
        return reference.encode(x, grid, trusted)
    scale, shift = grid.scale.clone(), shift_of(grid)
    codes, step = torch.empty_like(x, dtype=torch.int8), float(scale)
    numbers = (reciprocal(step), step, 0.0 if shift is None else float(shift))
    exact = library().codes_of_values(x.data_ptr(), x.numel(), *numbers, not trusted, codes.data_ptr())
    return InputCodes(codes, scale, shift) if exact else None


def decode(codes: InputCodes, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return ``(codes - shift) · scale``, computed in float32, in ``dtype``, laid out as the codes.

    Args:
        codes: that :func:`encode` returned.
        dtype: of the result: float32, float16 or bfloat16.
        out: float32 memory for the computation, laid out as the codes; overwritten, and returned if ``dtype`` is
            float32. None: new memory.
    """
    held = codes.codes
    if not (held.is_cpu and is_dense(held) and are_vectors(codes.scale) and is_plain(out)):
        return reference.decode(codes, dtype, out)
    x = torch.empty_like(held, dtype=torch.float32) if out is None else out
    shift = 0.0 if codes.shift is None else float(codes.shift)
    library().values_of_codes(held.data_ptr(), held.numel(), float(codes.scale), shift, x.data_ptr())
    return as_dtype(x, dtype)
