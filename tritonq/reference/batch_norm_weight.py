"""The weight of a training step with BatchNorm, in PyTorch: the specification of `tritonq.kernels.batch_norm_weight`.

The weight is multiplied by its *fold*, γ/σ of the BatchNorm per out channel (`tritonq.reference.fold`), then observed
and quantized (`tritonq.reference.weight`). Kernels do it in one launch.
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
        codes: in the dtype of the convolution, shaped as the rows; see :func:`fit_codes`.
        unit: (out,), the value of a code of 1.
        ratio: (out,), ``fold / unit``: dividing the convolution with ``codes`` by it gives that with the unfolded
            weight.
        fold: (out,), the BatchNorm's ``γ/σ``, or ``1/σ`` where that is nearly 0.
        inverse_std: (out,), ``1/σ``.
        clips: whether some value lay outside the code range; True if that is not known.
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

    Args:
        rows: the weight, (out, ...), any float dtype.
        running_var: (out,), from before this step's update.
        gamma: (out,), or None for 1.
        eps: of the BatchNorm.
        code_dtype: dtype of the result's codes, that of the convolution.
        dtype: of the arithmetic: float32 or float64.
        grid: of the weight's quantizer, per tensor or per out channel; None leaves the folded weight in float.
        statistics: the running range of the grid; None observes nothing.
        known: fold and ``1/σ``, (out,) each, of a step that is run again (checkpointing); they replace ``running_var``,
            which has changed since. None: computed.
        out: memory for the codes: shaped as ``rows``, in ``dtype``; None: new memory.
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
    """Compute :func:`quantize` from functions of two given modules.

    The backend "compiled" calls this with its own modules: ``folds`` has the functions of `tritonq.reference.fold`, and
    ``weights`` those of `tritonq.reference.weight`. The other arguments are those of :func:`quantize`.
    """
    fold, inverse_std = known or folds.nonzero_fold(running_var, gamma, eps, dtype)
    codes, unit, clips, frozen = weights.quantize_folded(rows, fold, grid, statistics, out)
    codes, unit = fit_codes(codes, unit, code_dtype)
    return StepWeight(codes, unit, fold / unit, fold, inverse_std, clips, frozen)


@operator(returns=_CODES, scratch=("out",), visible=True, made_again=True)
def codes_again(
    rows: Tensor, fold: Tensor, grid: Grid | None, code_dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return the codes of :func:`quantize` once more, for the backward: the forward does not keep them.

    Args:
        rows: the weight.
        fold: (out,), that :func:`quantize` returned.
        grid: the snapshot (the copy of the grid) that :func:`quantize` returned.
        code_dtype: dtype of the codes.
        out: memory for the codes before they are converted to ``code_dtype``, or None.
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
    ``dfold = Σ q · rows`` per out channel, and γ's is ``n + dfold / σ - n · eps_share``, with n the product of
    ``sum_gn`` and the sign of ``fold``. (For a γ of 0, or nearly, it is n.)

    Args:
        dcodes: gradient with respect to the codes (float tensors), shaped as ``rows``; may be overwritten.
        rows: the weight, (out, ...).
        gamma: (out,), as the following vectors; None for 1.
        fold: ``γ/σ``, as :func:`quantize` returned it.
        inverse_std: ``1/σ``, with σ of the running variance.
        unit: the value of a code of 1: codes times unit are the folded, rounded weight.
        eps_share: ``eps / (var + eps)``, 0..1, with the batch's variance of the convolution with the unfolded weight.
        sum_gn: ``Σ g (c - mean) / std`` over the batch: c is the convolution's output, g the gradient of what the
            BatchNorm returns.
        grid: the snapshot that :func:`quantize` returned; None without a quantizer.
        clips: from the forward; False: nothing was clipped, so no gradient is blocked.
    """
    drows, dfold = reference_weight.folded_backward(dcodes, rows, fold, unit, grid, clips)
    if gamma is None:
        return drows, dfold
    return drows, as_dtype(
        reference_fold.gamma_gradient(gamma, fold, inverse_std, eps_share, sum_gn, dfold), fold.dtype
    )


def fit_codes(codes: Tensor, unit: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes in ``dtype``, that of the convolution, and their unit.

    In float16 a sum of 8-bit codes overflows. Codes are therefore multiplied by the power of two nearest to their unit,
    which is exact, and the unit is divided by it.
    """
    if dtype != torch.float16:
        return as_dtype(codes, dtype), unit
    mantissa, exponent = torch.frexp(unit)
    # The mantissa is at least a half: from the root of a half on, the power above is the nearer one.
    exponent = exponent - (mantissa < _ABOVE_ROOT_HALF).int()
    power = torch.ldexp(torch.ones_like(unit), exponent.clamp(*_HALF_EXPONENTS))
    return (codes * power.view(-1, *[1] * (codes.dim() - 1))).to(dtype), unit / power
