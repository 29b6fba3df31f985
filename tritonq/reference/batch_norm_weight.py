"""The weight of a training step with BatchNorm, in PyTorch: the specification of `tritonq.kernels.batch_norm_weight`.

The weight is multiplied by its *fold*, γ/σ of the BatchNorm per out channel with ``σ = sqrt(running_var + eps)``, or
``1/σ`` where ``|γ/σ| < 1e-12``. Then it is observed and quantized. Kernels do it in one launch. A weight is given as
*rows*: out channels on axis 0.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype
from tritonq.grid import Grid, RangeStatistics
from tritonq.reference import fold as reference_fold
from tritonq.reference import weight as reference_weight
from tritonq.reference.operator import CopyOf, Like, New, operator
from tritonq.reference.ranges import OBSERVED

# The first float32 above the root of a half, which lies between two of them.
_ABOVE_ROOT_HALF = float.fromhex("0x1.6a09e8p-1")
# float16 holds 2^-24 .. 2^15 exactly; a code has up to 2^8 - 1.
_HALF_EXPONENTS = (-24, 7)


class StepWeight(NamedTuple):
    """A folded and quantized weight: ``codes · unit`` per out channel.

    Attributes:
        codes: ``code - zero_point`` in the dtype of the convolution, shaped as the rows (in float16 times a power of
            two, by which ``unit`` is divided); the folded weight without a grid or while it is switched off.
        unit: (out,), the value of 1 in ``codes``; 1 without a grid or while it is switched off.
        ratio: (out,), ``fold / unit``: dividing the convolution with ``codes`` by it gives that with the unfolded
            weight.
        fold: (out,), the BatchNorm's ``γ/σ``, or ``1/σ`` where that is nearly 0.
        inverse_std: (out,), ``1/σ``.
        clips: whether some value lay outside the code range; True if that is not known, False without a quantizer.
        grid: a snapshot: a copy of the grid as this step used it, for the backward; None without a quantizer.
    """

    codes: Tensor
    unit: Tensor
    ratio: Tensor
    fold: Tensor
    inverse_std: Tensor
    clips: bool
    grid: Grid | None


_VECTOR: Any = New(lambda arguments: (len(arguments["rows"]),), "rows", "dtype")
_CODES: Any = Like("rows", "code_dtype")
_SNAPSHOT: Any = CopyOf("grid", lambda arguments: (len(arguments["rows"]),))


@operator(
    returns=StepWeight(_CODES, _VECTOR, _VECTOR, _VECTOR, _VECTOR, True, _SNAPSHOT),
    mutates=OBSERVED,
    scratch=("known", "out"),
    visible=True,
    made_again=True,
)
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
    """Fold a weight with its BatchNorm's running variance, observe its range, and quantize it.

    ``code = clip(round(rows · fold / s) + z) - z`` with scale s and zero point z of the updated grid.

    Args:
        rows: the weight, (out, ...), any float dtype.
        running_var: (out,), from before this step's update; not changed.
        gamma: (out,), or None for 1.
        eps: of the BatchNorm.
        code_dtype: dtype of the result's codes, that of the convolution. Codes in float16 are multiplied by a power of
            two (:func:`fit_codes`).
        dtype: of the arithmetic: float32 or float64.
        grid: of the weight's quantizer, per tensor or per out channel; None leaves the folded weight in float.
        statistics: the running range of the grid: both are updated in place with the folded weight. If it is None,
            frozen or switched off, or there is no grid, nothing is observed.
        known: fold and ``1/σ``, (out,) each, of a step that is run again (checkpointing); they replace ``running_var``,
            which has changed since. None: computed.
        out: memory for the codes before they are converted to ``code_dtype``: shaped as ``rows``, in ``dtype``; None:
            new memory.

    Returns:
        A :class:`StepWeight`, whose vectors are in ``dtype``.
    """
    families = (reference_fold, reference_weight)
    return composed(*families, rows, running_var, gamma, eps, code_dtype, dtype, grid, statistics, known, out)


def composed(
    folds: ModuleType,
    weights: ModuleType,
    rows: Tensor,
    running_var: Tensor,
    gamma: Tensor | None,
    eps: float,
    code_dtype: torch.dtype,
    dtype: torch.dtype,
    grid: Grid | None,
    statistics: RangeStatistics | None,
    known: tuple[Tensor, Tensor] | None,
    out: Tensor | None,
) -> StepWeight:
    """Fold, observe and quantize a weight by the functions of two given modules.

    ``code = clip(round(rows · fold / s) + z) - z`` with scale s and zero point z of the updated grid.

    Args:
        folds: has ``nonzero_fold`` of `tritonq.reference.fold`; the backend "compiled" gives its own.
        weights: has ``quantize_folded`` of `tritonq.reference.weight`.
        rows: the weight, (out, ...).
        running_var: (out,), not changed; not read if ``known`` is given.
        gamma: (out,), or None for 1.
        eps: of the BatchNorm.
        code_dtype: dtype of the codes.
        dtype: of the arithmetic: float32 or float64.
        grid: of the weight's quantizer; None leaves the folded weight in float.
        statistics: the running range of the grid: both are updated in place. If it is None, frozen or switched off, or
            there is no grid, nothing is observed.
        known: fold and ``1/σ`` of a step that is run again; None: computed from ``running_var``.
        out: memory for the codes before they are converted to ``code_dtype``: shaped as ``rows``, in ``dtype``; None:
            new memory.

    Returns:
        A :class:`StepWeight`: codes and their unit, the ratio of fold and unit, fold and ``1/σ``, whether a value may
        be clipped, and a copy of the grid.
    """
    fold, inverse_std = known or folds.nonzero_fold(running_var, gamma, eps, dtype)
    codes, unit, clips, frozen = weights.quantize_folded(rows, fold, grid, statistics, out)
    codes, unit = fit_codes(codes, unit, code_dtype)
    return StepWeight(codes, unit, fold / unit, fold, inverse_std, clips, frozen)


@operator(returns=_CODES, scratch=("out",), visible=True, made_again=True)
def codes_again(
    rows: Tensor, fold: Tensor, grid: Grid | None, code_dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return a weight's codes ``clip(round(rows · fold / s) + z) - z`` in ``code_dtype``; nothing is observed.

    In float16 they are multiplied by the power of two nearest to s. While the grid is switched off they are
    ``rows · fold``. A backward calls this, because a forward does not keep its codes.

    Args:
        rows: the weight, (out, ...).
        fold: (out,), that :func:`quantize` returned.
        grid: the snapshot (the copy of the grid) that :func:`quantize` returned; None: the weight is folded only.
        code_dtype: dtype of the codes, that of the convolution.
        out: memory for the codes before they are converted to ``code_dtype``: shaped as ``rows``, in the dtype of
            ``fold``; None: new memory.
    """
    codes, unit, *_ = reference_weight.folded_codes(rows, fold, grid, out)
    return fit_codes(codes, unit, code_dtype)[0]


@operator(returns=(Like("rows", "fold"), Like("fold")), overwrites=("dcodes",), visible=True)
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
    """Return ``(gradient of the weight, gradient of γ)`` from the gradient of the codes; without γ that of the fold.

    With ``q = dcodes / unit``, 0 where the code was clipped: the weight's gradient is ``fold · q``, the fold's is
    ``dfold = Σ q · rows`` per out channel, and γ's is ``n + dfold / σ - n · eps_share``, with ``n = sum_gn ·
    sign(fold)``; where ``|γ/σ| < 1e-12`` it is n (the fold is ``1/σ`` there, so its sign is 1).

    Args:
        dcodes: gradient with respect to ``StepWeight.codes``, any float dtype, shaped as ``rows``; may be overwritten.
        rows: the weight, (out, ...).
        gamma: (out,), as all vectors here; None for 1.
        fold: ``γ/σ``, or ``1/σ`` where that is nearly 0, as :func:`quantize` returned it.
        inverse_std: ``1/σ``, with σ of the running variance.
        unit: as :func:`quantize` returned it: codes times unit are the folded, rounded weight.
        eps_share: ``eps / (var + eps)``, 0..1, with the batch's variance of the convolution with the unfolded weight.
        sum_gn: ``Σ g (c - mean) / std`` over the batch: c is the convolution's output, g the gradient of what the
            BatchNorm returns.
        grid: the snapshot that :func:`quantize` returned; None without a quantizer.
        clips: as :func:`quantize` returned it; False: nothing was clipped, so no gradient is blocked.

    Returns:
        (out, ...) and (out,), in the dtype of ``fold``.
    """
    drows, dfold = reference_weight.folded_backward(dcodes, rows, fold, unit, grid, clips)
    if gamma is None:
        return drows, dfold
    return drows, as_dtype(
        reference_fold.gamma_gradient(gamma, fold, inverse_std, eps_share, sum_gn, dfold), fold.dtype
    )


def fit_codes(codes: Tensor, unit: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes in ``dtype``, that of the convolution, and their unit: ``codes · unit`` stays the same.

    Both are returned as they are where nothing is to be converted; neither is changed in place.

    If ``dtype`` is float16, in which a sum of 8-bit codes overflows, codes are multiplied by the power of two nearest
    to their unit (within 2^-24..2^7), which is exact, and the unit is divided by it. ``codes`` are (out, ...), ``unit``
    (out,).
    """
    if dtype != torch.float16:
        return as_dtype(codes, dtype), unit
    mantissa, exponent = torch.frexp(unit)
    # The mantissa is at least a half: from the root of a half on, the power above is the nearer one.
    exponent = exponent - (mantissa < _ABOVE_ROOT_HALF).int()
    power = torch.ldexp(torch.ones_like(unit), exponent.clamp(*_HALF_EXPONENTS))
    return (codes * power.view(-1, *[1] * (codes.dim() - 1))).to(dtype), unit / power
