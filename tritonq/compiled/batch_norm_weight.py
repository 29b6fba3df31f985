"""A step's folded and quantized weight, composed of the compiled functions of `fold` and `weight`.

Functions are those of `tritonq.reference.batch_norm_weight`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.compiled import fold as folds
from tritonq.compiled import weight as weights
from tritonq.grid import Grid, RangeStatistics
from tritonq.reference.batch_norm_weight import StepWeight, composed, fit_codes


def quantize(
    rows: Tensor,
    running_var: Tensor,
    gamma: Tensor | None,
    eps: float,
    code_dtype: torch.dtype,
    dtype: torch.dtype,
    grid: Grid | None,
    statistics: RangeStatistics | None,
    known: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> StepWeight:
    """Compute :func:`tritonq.reference.batch_norm_weight.quantize` in C++: fold, observe and quantize a weight."""
    families = (folds, weights)
    return composed(*families, rows, running_var, gamma, eps, code_dtype, dtype, grid, statistics, known, out)


def codes_again(
    rows: Tensor, fold: Tensor, grid: Grid | None, code_dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Compute :func:`tritonq.reference.batch_norm_weight.codes_again` in C++: the codes once more."""
    codes, unit, *_ = weights.folded_codes(rows, fold, grid, out)
    return fit_codes(codes, unit, code_dtype)[0]


def gradients(
    dcodes: Tensor,
    rows: Tensor,
    gamma: Tensor | None,
    fold: Tensor,
    inverse_std: Tensor,
    unit: Tensor,
    eps_share: Tensor,
    sum_gn: Tensor,
    grid: Grid | None,
    clips: bool,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`tritonq.reference.batch_norm_weight.gradients` in C++: the gradients of weight and γ."""
    drows, dfold = weights.folded_backward(dcodes, rows, fold, unit, grid, clips)
    if gamma is None:
        return drows, dfold
    return drows, folds.gamma_gradient(gamma, fold, inverse_std, eps_share, sum_gn, dfold)
