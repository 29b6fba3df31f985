"""Histograms with equal bins over a given range, as a public function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonq.arithmetic import whole_number
from tritonq.backend import Backend, implementation
from tritonq.functional.validate import check_axis, check_float_tensor

# An index of a bin is a 32-bit integer, and exact in float32.
_MOST_BINS = 2**24


def histogram(
    x: Tensor, bins: int, lo: float, hi: float, *, axis: int | None = None, backend: Backend = "auto"
) -> Tensor:
    """Count the values of ``x`` in ``bins`` equal bins from ``lo`` to ``hi``; no gradient.

    Bin i counts ``floor((x - lo) * bins / (hi - lo)) == i`` in float32, the last one ``x == hi`` too. Values outside
    the range and NaN are not counted. Equals ``torch.histc(x, bins, lo, hi)``, but in int64, so exact past 2^24.

    Args:
        x: any shape; float32, float16, bfloat16 or float64 (then the arithmetic is float64).
        bins: number of bins, 1..2^24.
        lo: lower edge of the first bin.
        hi: upper edge of the last bin.
        axis: one histogram per index of this axis, which may be negative; None: one of all values.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.

    Returns:
        int64 on ``x``'s device, (bins,) or (x.shape[axis], bins).

    Raises:
        TypeError: ``x`` is no float tensor, or ``bins`` or ``axis`` no int.
        ValueError: bins out of range; ``lo >= hi``, or ``(hi - lo) * bins`` not finite, in the arithmetic's dtype; an
            axis out of range.
        RuntimeError: ``backend="triton"`` where no kernel can run.

    Source: torch.histc.

    Examples:
        >>> import torch
        >>> histogram(torch.tensor([0.0, 0.4, 0.5, 1.0, 2.0]), 2, 0.0, 1.0)
        tensor([2, 2])
    """
    x = check_float_tensor("x", x).detach()
    whole = whole_number(bins)
    if whole is None:
        raise TypeError(f"bins must be an int, got {bins!r}")
    bins = whole
    if not 1 <= bins <= _MOST_BINS:
        raise ValueError(f"bins must be in 1..{_MOST_BINS}, got {bins}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    limits = torch.tensor([lo, hi], dtype=dtype)
    if not 0 < float((limits[1] - limits[0]) * bins) < math.inf:
        raise ValueError(
            f"lo and hi must be finite and ascend, and (hi - lo) * bins must be finite, in {dtype}: got {lo} and {hi}"
        )
    axis = None if axis is None else check_axis(x, axis)
    counts: Tensor = implementation("histogram", x, backend).linear_histogram(x, bins, limits.to(x.device), axis)
    return counts
