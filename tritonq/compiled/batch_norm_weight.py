"""A step's folded and quantized weight, composed of the compiled functions of `fold` and `weight`.

Functions have the names, signatures and results of `tritonq.reference.batch_norm_weight`. To *fold* a BatchNorm is to
multiply each row (out channel) of the weight by γ/σ, ``σ = sqrt(running_var + eps)``, or by ``1/σ`` where
``|γ/σ| < 1e-12``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.compiled import fold as folds
from tritonq.compiled import weight as weights
from tritonq.compiled.arguments import are_vectors, note_observed, observes, range_arguments, rests_on_data
from tritonq.compiled.build import library
from tritonq.grid import SWITCH, Grid, RangeStatistics
from tritonq.reference.batch_norm_weight import StepWeight, composed, fit_codes
from tritonq.reference.fold import TINY_FOLD


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

    ``code = clip(round(rows · γ/σ / s) + z) - z`` with scale s and zero point z of the updated grid.

    Args:
        rows: the weight, (out, ...), any float dtype.
        running_var: (out,), from before this step's update; not changed.
        gamma: (out,); None for 1.
        eps: of the BatchNorm.
        code_dtype: dtype of the codes, that of the convolution.
        dtype: of the arithmetic: float32 or float64.
        grid: of the weight's quantizer, updated in place. None: nothing is observed, and the folded weight stays in
            float: it is returned as ``codes``, with a ``unit`` of 1, ``clips`` False and a grid of None.
        statistics: the running range of the grid, updated in place; None observes nothing.
        known: ``(γ/σ, 1/σ)`` of a step that is run again (checkpointing), in place of ``running_var``; None: computed.
        out: memory for the codes, shaped as ``rows``, in ``dtype``; None: new memory. If ``code_dtype`` is another,
            they are converted into new memory.

    Returns:
        A :class:`~tritonq.reference.batch_norm_weight.StepWeight`: ``codes`` (in float16 times a power of two)
        times ``unit`` is the folded weight, rounded if the grid is switched on and its range has data. With them come
        ``ratio`` (``(γ/σ) / unit``), γ/σ and ``1/σ``, as ``unit`` (out,) in ``dtype``, ``clips`` (whether a value may
        lie outside the codes) and a copy of the grid as this step used it, for the backward.
    """
    if known is None and grid is not None and grid.is_enabled_on_host() and code_dtype is dtype is torch.float32:
        made = _in_one_call(rows, running_var, gamma, eps, grid, statistics, out)
        if made is not None:
            return made
    families = (folds, weights)
    return composed(*families, rows, running_var, gamma, eps, code_dtype, dtype, grid, statistics, known, out)


def codes_again(
    rows: Tensor, fold: Tensor, grid: Grid | None, code_dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return a weight's codes ``clip(round(rows · fold / s) + z) - z`` in ``code_dtype``; nothing is observed.

    In float16 they are multiplied by the power of two nearest to s. While the grid is switched off they are
    ``rows · fold``. A backward calls this, because a forward does not keep its codes.

    Args:
        rows: the weight, (out, ...).
        fold: (out,), γ/σ as :func:`quantize` returned it.
        grid: the copy of the grid that :func:`quantize` returned; None: the result is ``rows · fold``.
        code_dtype: dtype of the convolution.
        out: memory for the codes before they are converted to ``code_dtype``: shaped as ``rows``, in the dtype of
            ``fold``; None: new memory.
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

    With ``q = dcodes / unit``, 0 where the code was clipped: the weight's is ``fold · q``, the fold's ``dfold = Σ q ·
    rows`` per out channel, γ's ``n + dfold / σ - n · eps_share`` with ``n = sum_gn · sign(fold)``, n where
    ``|γ/σ| < 1e-12``.

    Args:
        dcodes: gradient of the codes, shaped as ``rows``; may be overwritten with the weight's and returned.
        rows: the weight, (out, ...), not folded.
        gamma: (out,), as all vectors here; None for 1.
        fold: γ/σ, or ``1/σ`` where that is nearly 0, as :func:`quantize` returned it.
        inverse_std: ``1/σ``.
        unit: the value of a code of 1, as :func:`quantize` returned it.
        eps_share: ``eps / (var + eps)``, 0..1, with the batch's variance of the convolution with the unfolded weight.
        sum_gn: ``Σ g (c - mean) / std``: c is the convolution's output, g the gradient of what the BatchNorm returns.
        grid: the copy of the grid that :func:`quantize` returned; None without a quantizer.
        clips: as :func:`quantize` returned it; False: no gradient is blocked.
    """
    if gamma is None or grid is None or not _fits_one_call(dcodes, rows, (gamma, fold, inverse_std, unit), grid):
        drows, dfold = weights.folded_backward(dcodes, rows, fold, unit, grid, clips)
        if gamma is None:
            return drows, dfold
        return drows, folds.gamma_gradient(gamma, fold, inverse_std, eps_share, sum_gn, dfold)
    dgamma, masks = torch.empty_like(fold), clips and grid.is_enabled_on_host()
    library().step_weight_backward(
        *(dcodes.data_ptr(), rows.data_ptr(), len(rows), rows.numel() // len(rows)),
        *(vector.data_ptr() for vector in (gamma, fold, inverse_std, unit, eps_share, sum_gn, grid.scale)),
        *(TINY_FOLD, masks, grid.qtype.quant_min, grid.qtype.quant_max, dcodes.data_ptr(), dgamma.data_ptr()),
    )
    return dcodes, dgamma


def _fits_one_call(dcodes: Tensor, rows: Tensor, vectors: tuple[Tensor, ...], grid: Grid) -> bool:
    """Whether one function in C++ can compute :func:`gradients`; ``vectors`` are γ, γ/σ, ``1/σ`` and the unit.

    That takes float32 tensors on the CPU, one scale per row and no zero point.
    """
    if grid.scale.numel() != len(rows) or dcodes.stride() != rows.stride() or not are_vectors(*vectors):
        return False
    return weights.takes(rows, vectors[1], grid, dcodes)


def _in_one_call(
    rows: Tensor,
    running_var: Tensor,
    gamma: Tensor | None,
    eps: float,
    grid: Grid,
    statistics: RangeStatistics | None,
    out: Tensor | None,
) -> StepWeight | None:
    """Compute :func:`quantize` by one function in C++; None, with nothing changed, if that can't compute it.

    It takes a float32 weight of finite values, one scale per row without zero point, and a range that has data or is
    observed in this call.
    """
    if not (weights.takes(rows, running_var, grid, out) and weights.follows(grid, statistics, len(rows))):
        return None
    changes = observes(statistics)
    if not rests_on_data(statistics, changes) or not are_vectors(gamma):
        return None
    count, codes = len(rows), torch.empty_like(rows) if out is None else out
    vectors = torch.empty((4, count))
    clips = library().step_weight(
        *(rows.data_ptr(), count, rows.numel() // count, running_var.data_ptr()),
        *(None if gamma is None else gamma.data_ptr(), eps, TINY_FOLD),
        *range_arguments(grid, statistics),
        *(changes, vectors.data_ptr(), codes.data_ptr()),
    )
    if clips < 0:
        return None
    if changes:
        note_observed(grid, statistics)
    fold, inverse_std, ratio, unit = vectors.unbind(0)
    frozen = Grid(unit.view_as(grid.scale), None, grid.qtype, SWITCH[True])
    return StepWeight(codes, unit, ratio, fold, inverse_std, bool(clips), frozen)
