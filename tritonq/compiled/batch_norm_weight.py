"""A step's folded and quantized weight, composed of the compiled functions of `fold` and `weight`.

Functions have the names, signatures and results of `tritonq.reference.batch_norm_weight`. To *fold* a BatchNorm is to
multiply each row of the weight by γ/σ, ``σ = sqrt(running_var + eps)``.
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
    """Fold a weight with its BatchNorm, observe its range, and quantize it, in C++.

    Args:
        rows: the weight, (out, ...), any float dtype.
        running_var: (out,), from before this step's update.
        gamma: (out,); None for 1.
        eps: of the BatchNorm.
        code_dtype: dtype of the codes, that of the convolution.
        dtype: of the arithmetic: float32 or float64.
        grid: of the weight's quantizer, updated in place; None leaves the folded weight in float.
        statistics: the running range of the grid, updated in place; None observes nothing.
        known: ``(γ/σ, 1/σ)`` of a step that is run again (checkpointing), in place of ``running_var``; None: computed.
        out: memory for the codes; None: new memory.

    Returns:
        A :class:`~tritonq.reference.batch_norm_weight.StepWeight`: ``codes · unit`` is the rounded folded weight. With
        it come ``ratio`` (``(γ/σ) / unit``), γ/σ, ``1/σ``, ``clips`` (whether a value may lie outside the codes) and a
        copy of the grid as this step used it, for the backward.
    """
    families = (folds, weights)
    return composed(*families, rows, running_var, gamma, eps, code_dtype, dtype, grid, statistics, known, out)


def codes_again(
    rows: Tensor, fold: Tensor, grid: Grid | None, code_dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return the codes of :func:`quantize` once more, in ``code_dtype``, for the backward: the forward keeps none.

    Args:
        rows: the weight.
        fold: (out,), γ/σ as :func:`quantize` returned it.
        grid: the copy of the grid that :func:`quantize` returned; None: the weight was folded only.
        code_dtype: dtype of the convolution.
        out: memory for the codes before they are converted to ``code_dtype``; None: new memory.
    """
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
    """Return two gradients from that of the codes: of the weight, and of γ (if that is None: of γ/σ).

    ``dcodes`` is the gradient of the codes and may be overwritten. ``fold`` (γ/σ), ``inverse_std`` (1/σ), ``unit``,
    ``grid`` and ``clips`` are those that :func:`quantize` returned; ``eps_share`` and ``sum_gn`` come from the
    BatchNorm's forward and backward (`tritonq.reference.conv_bn`).
    """
    drows, dfold = weights.folded_backward(dcodes, rows, fold, unit, grid, clips)
    if gamma is None:
        return drows, dfold
    return drows, folds.gamma_gradient(gamma, fold, inverse_std, eps_share, sum_gn, dfold)
