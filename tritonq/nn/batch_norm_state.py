"""What a training step reads and updates of a BatchNorm."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tritonq.functional.recomputation import is_recomputing
from tritonq.nn.fusable import has_hooks
from tritonq.reference.conv_bn import BatchNormState


def batch_norm_state(bn: nn.modules.batchnorm._BatchNorm) -> BatchNormState:
    """Return buffers and constants of ``bn`` for a training step, which is counted.

    Copies for one that is recomputed.
    """
    running_mean, running_var = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
    if is_recomputing():
        return BatchNormState(running_mean.clone(), running_var.clone(), 0.0, bn.eps)
    momentum: float | Tensor | None = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    if momentum is None:
        momentum = cast(Tensor, bn.num_batches_tracked).double().reciprocal()
    return BatchNormState(running_mean, running_var, momentum, bn.eps)


def is_plain(bn: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether ``bn`` computes what its buffers say, on this rank alone, and nobody listens."""
    alone = isinstance(bn, nn.SyncBatchNorm) and not (dist.is_available() and dist.is_initialized())
    return (alone or type(bn) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and not has_hooks(bn)


def gamma_signs(bn: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """Return the sign of γ per channel, 1 where it is 0 or missing: in the dtype of the running variance."""
    gamma = cast(Tensor, bn.running_var) if bn.weight is None else bn.weight.detach()
    return torch.where(gamma < 0, -1.0, 1.0).to(gamma.dtype)
