"""Folding BatchNorm into the convolution before it, in C++: one call in place of eight operators on vectors.

The *fold* is γ/σ per out channel, with ``σ = sqrt(running_var + eps)``: a training step multiplies the weight by it and
divides by it, and takes ``1/σ`` where ``|γ/σ| < 1e-12``. Other vectors than float32 on a CPU `tritonq.reference.fold`
computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.compiled.arguments import are_vectors
from tritonq.compiled.build import library
from tritonq.reference import fold as reference
from tritonq.reference.fold import TINY_FOLD


def nonzero_fold(running_var: Tensor, gamma: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the fold ``s = γ/σ``, or ``1/σ`` where ``|γ/σ| < 1e-12``, and ``1/σ``: (channels,) each, in ``dtype``.

    Args:
        running_var: (channels,).
        gamma: (channels,); None for 1.
        eps: added to the variance.
        dtype: of the arithmetic and the results: float32 or float64.
    """
    if dtype is not torch.float32 or not are_vectors(running_var, gamma):
        return reference.nonzero_fold(running_var, gamma, eps, dtype)
    fold, inverse_std = torch.empty_like(running_var), torch.empty_like(running_var)
    given = None if gamma is None else gamma.data_ptr()
    addresses = (fold.data_ptr(), inverse_std.data_ptr())
    library().nonzero_fold(running_var.data_ptr(), given, len(running_var), eps, TINY_FOLD, *addresses)
    return fold, inverse_std


def gamma_gradient(
    gamma: Tensor, fold: Tensor, inverse_std: Tensor, eps_share: Tensor, sum_gn: Tensor, dfold: Tensor
) -> Tensor:
    """Return the gradient of γ: ``n + dfold / σ - n · eps_share``, or n where ``|γ/σ| < 1e-12``.

    ``n = sum_gn · sign(s)``.

    Args:
        gamma: (channels,), as all others and the result, which has its dtype.
        fold: ``s`` of :func:`nonzero_fold`: ``γ/σ``, or ``1/σ`` where that is nearly 0.
        inverse_std: ``1/σ`` of :func:`nonzero_fold`.
        eps_share: ``eps / (var + eps)``, 0..1, with the batch's variance of the unfolded convolution.
        sum_gn: ``Σ g (c - mean) / std``: g is the gradient of what the BatchNorm returns, c the output of the
            convolution with the folded weight.
        dfold: gradient of ``s``.
    """
    vectors = (gamma, fold, inverse_std, eps_share, sum_gn, dfold)
    if not are_vectors(*vectors):
        return reference.gamma_gradient(*vectors)
    result = torch.empty_like(fold)
    library().gamma_gradient(*map(Tensor.data_ptr, vectors), len(fold), TINY_FOLD, result.data_ptr())
    return result


remembered = reference.remembered
