"""A step's weight in one launch: fold it with its BatchNorm, observe its range, write codes in the convolution's dtype.

To *fold* a BatchNorm is to multiply each row of the weight by γ/σ, ``σ = sqrt(running_var + eps)``. Functions here have
the names, signatures and results of `tritonq.reference.batch_norm_weight`, their specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached_launch import Launcher
from .launch_sizes import device_guard
from .quantized import Grid, RangeStatistics
from .weight import fold_rows, observe_in_advance
from .weight import gradients as weight_gradients
from .weight import quantize as quantize_rows
from .weight_rows import nonzero_fold

_BLOCK = 128


@Launcher
@triton.jit
def fold_kernel(
    running_var_ptr,  # (channels,)
    gamma_ptr,  # (channels,), or None for 1
    fold_ptr,  # (channels,) float32
    inverse_std_ptr,  # (channels,) float32
    eps,  # of the BatchNorm
    channels,
    BLOCK: tl.constexpr,  # channels of a program
):
    """Write ``1/σ`` of BLOCK channels, ``σ = sqrt(running_var + eps)``, and their fold.

    The fold is ``γ/σ``, or ``1/σ`` if ``|γ/σ| < 1e-12``.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = channel < channels
    fold, inverse_std = nonzero_fold(running_var_ptr, gamma_ptr, eps, channel, valid)
    tl.store(fold_ptr + channel, fold, mask=valid)
    tl.store(inverse_std_ptr + channel, inverse_std, mask=valid)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, bool, Grid | None]:
    """Fold a weight with its BatchNorm, observe its range, and quantize it, in one launch.

    If one scale for the whole weight is to be observed, fold and range take launches of their own before.

    ``codes = clip(round(rows · γ/σ / scale) + zero_point) - zero_point``, ``unit = scale``. In float16 codes are
    multiplied by the power of two nearest to their unit (2^-24 to 2^7), and the unit divided by it. While the grid's
    switch is off, or the running range is empty, codes are ``rows · γ/σ`` and the unit is 1.

    Args:
        rows: the weight, (out, ...), any float dtype.
        running_var: (out,), from before this step's update.
        gamma: (out,); None for 1.
        eps: of the BatchNorm.
        code_dtype: dtype of the codes, that of the convolution.
        dtype: of the arithmetic: float32.
        grid: of the weight's quantizer, updated in place when its range is; None leaves the folded weight in float.
        statistics: the running range of the grid, updated in place. If it is None, frozen or its switch is off, nothing
            is observed.
        known: ``(γ/σ, 1/σ)`` of a step that is run again (checkpointing): ``running_var``, ``gamma`` and ``eps`` are
            not read; None: both are computed.
        out: not used: a GPU's allocator hands out again what was freed.

    Returns:
        ``(codes, unit, ratio, γ/σ, 1/σ, clips, snapshot)``: ``codes · unit`` is the rounded folded weight, ``ratio`` is
        ``(γ/σ) / unit``, ``clips`` whether a value may lie outside the codes (True with a grid), ``snapshot`` a copy of
        the grid as this step used it, scale and switch (out,) (None without a grid, when ``unit`` is 1). Codes are
        shaped as ``rows``; vectors are float32 (out,). γ/σ is 1/σ where it would be below 1e-12 in magnitude.
    """
    if known is None:
        fold, inverse_std = torch.empty((2, len(rows)), dtype=torch.float32, device=rows.device).unbind(0)
    else:
        fold, inverse_std = known
    norm = (running_var, gamma, eps, inverse_std) if known is None else None
    observes = statistics is not None and not statistics.frozen
    needs_fold = grid is None or (observes and grid.qtype.axis is None)
    if needs_fold and norm is not None:
        _fold(fold, *norm)
        norm = None
    if grid is None:
        codes = codes_again(rows, fold, None, code_dtype)
        return codes, torch.ones_like(fold), fold, fold, inverse_std, False, None
    observes = observes and not observe_in_advance(rows, fold, grid, statistics)
    made = quantize_rows(rows, fold, grid, statistics, code_dtype, observes=observes, norm=norm)
    return made.codes, made.unit, made.ratio, fold, inverse_std, True, made.grid


def codes_again(
    rows: Tensor, fold: Tensor, grid: Grid | None, code_dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return the codes of a folded weight on a grid, shaped as ``rows``, for a backward; nothing is observed.

    ``clip(round(rows · fold / scale) + zero_point) - zero_point``; in float16 times the power of two nearest to the
    scale on a logarithmic axis, from 2^-24 to 2^7. Without a grid, or if its switch is off, ``rows · fold``. The bits
    are those of :func:`quantize`, in new memory.

    Args:
        rows: the weight, (out, ...), any float dtype.
        fold: (out,) float32, the γ/σ that :func:`quantize` returned.
        grid: the snapshot that :func:`quantize` returned; None: the weight was folded only.
        code_dtype: dtype of the result, that of the convolution.
        out: not used.
    """
    if grid is None:
        return fold_rows(rows, fold).to(code_dtype)
    return quantize_rows(rows, fold, grid, None, code_dtype).codes


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
    """Return two gradients from that of the codes, in float32: of the weight, and of γ (without γ: of the fold).

    ``q = dcodes / unit``, 0 where the code was clipped. The weight's gradient is ``fold · q``; per channel ``dfold = Σ
    q · rows``, and γ's gradient is ``n + dfold · inverse_std - n · eps_share`` with ``n = sign(fold) · sum_gn`` (only
    ``n`` where ``|γ/σ| < 1e-12``).

    Args:
        dcodes: gradient of the codes, shaped as ``rows``.
        rows: the weight, (out, ...).
        gamma: (out,), as all vectors here; None: a γ of 1, and ``inverse_std``, ``eps_share``, ``sum_gn`` are not read.
        fold: ``γ/σ``, as :func:`quantize` returned it.
        inverse_std: ``1/σ``.
        unit: the factor between codes and folded values.
        eps_share: ``eps / (var + eps)``, with the batch's variance of the convolution by the weight before folding.
        sum_gn: ``Σ g (c - mean) / std`` over the batch, with g the gradient of the BatchNorm's result, c its input.
        grid: snapshot of the grid; None without a quantizer.
        clips: the ``clips`` of :func:`quantize`: whether a value may have been clipped; if not, no gradient is blocked.
    """
    norm = None if gamma is None else (gamma, inverse_std, eps_share, sum_gn)
    return weight_gradients(dcodes, rows, fold, unit, grid if clips else None, norm)


def _fold(fold: Tensor, running_var: Tensor, gamma: Tensor | None, eps: float, inverse_std: Tensor) -> None:
    """Write ``fold`` (``γ/σ``, or ``1/σ`` if ``|γ/σ| < 1e-12``) and ``inverse_std`` (``1/σ``); (out,) float32 each.

    Called when both are read before the weight's kernel runs.
    """
    with device_guard(fold):
        fold_kernel[(triton.cdiv(len(fold), _BLOCK),)](
            running_var,
            gamma,
            fold,
            inverse_std,
            eps,
            len(fold),
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
