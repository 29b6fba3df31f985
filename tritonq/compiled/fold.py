"""The operators of `tritonq.reference.fold` in C++: one call in place of eight operators on vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.compiled.arguments import are_vectors
from tritonq.compiled.build import library
from tritonq.reference import fold as reference
from tritonq.reference.fold import TINY_FOLD


def nonzero_fold(running_var: Tensor, gamma: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute :func:`tritonq.reference.fold.nonzero_fold` in C++: ``γ/σ``, never zero, and ``1/σ`` per channel."""
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
    """Compute :func:`tritonq.reference.fold.gamma_gradient` in C++: the gradient of γ, (channels,)."""
    vectors = (gamma, fold, inverse_std, eps_share, sum_gn, dfold)
    if not are_vectors(*vectors):
        return reference.gamma_gradient(*vectors)
    result = torch.empty_like(fold)
    library().gamma_gradient(*map(Tensor.data_ptr, vectors), len(fold), TINY_FOLD, result.data_ptr())
    return result


remembered = reference.remembered
