"""The operators of `tritonq.reference.fold` in C++: one call in place of eight operators on vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.compiled.arguments import are_vectors
from tritonq.compiled.build import library
from tritonq.reference import fold as reference
from tritonq.reference.fold import TINY_FOLD


def nonzero_fold(running_var: Tensor, gamma: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``γ/σ`` (``1/σ`` where that is near zero) and ``1/σ`` per channel; ``σ = sqrt(running_var + eps)``."""
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
    """Return the gradient of γ, (channels,): the sum of its ways through the result and through the fold.

    Arguments are (channels,) each: γ; ``fold`` and ``1/σ`` of :func:`nonzero_fold`; ``eps_share`` and ``sum_gn`` of the
    BatchNorm's forward and backward (`conv_bn`); and ``dfold``, the gradient of the fold.
    """
    vectors = (gamma, fold, inverse_std, eps_share, sum_gn, dfold)
    if not are_vectors(*vectors):
        return reference.gamma_gradient(*vectors)
    result = torch.empty_like(fold)
    library().gamma_gradient(*map(Tensor.data_ptr, vectors), len(fold), TINY_FOLD, result.data_ptr())
    return result


remembered = reference.remembered
