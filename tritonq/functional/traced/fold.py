"""A BatchNorm's running variance before the step moves it, and the factors that it gives, for ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.functional import conv_bn
from tritonq.reference.conv_bn import BatchNormState


def nonzero_fold(norm: BatchNormState, gamma: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`tritonq.functional.conv_bn.nonzero_fold`.

    An operator, lest a compiler compute it again in the backward: the step has moved the variance by then.
    """
    return _nonzero_fold(norm.running_var, gamma, norm.eps, dtype)  # type: ignore[no-any-return]


def remembered(running_var: Tensor) -> Tensor:
    """A copy that stays what it is: a compiler would copy again in the backward."""
    return _remembered(running_var)  # type: ignore[no-any-return]


@torch.library.custom_op("tritonq::remembered", mutates_args=())
def _remembered(running_var: Tensor) -> Tensor:
    return running_var.clone()


@_remembered.register_fake
def _(running_var: Tensor) -> Tensor:
    return torch.empty_like(running_var)


@torch.library.custom_op("tritonq::nonzero_fold", mutates_args=())
def _nonzero_fold(running_var: Tensor, gamma: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    fold, inverse_std = conv_bn.nonzero_fold(BatchNormState(running_var, running_var, 0.0, eps), gamma, dtype)
    return fold.clone(), inverse_std


@_nonzero_fold.register_fake
def _(running_var: Tensor, gamma: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(running_var, dtype=dtype), torch.empty_like(running_var, dtype=dtype)
