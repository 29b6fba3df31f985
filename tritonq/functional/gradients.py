"""Values with the gradient of another computation, as eval mode's integers have it, and whether one is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tritonq.functional.memo import held_tensors


def needs_gradient(module: nn.Module, *tensors: Tensor | None) -> bool:
    """Whether autograd records what a module computes of some tensors.

    That is so if gradients are on and a tensor, or a parameter or buffer of the module or a descendant, requires one.

    Args:
        module: the module whose forward asks.
        *tensors: what the forward reads besides: its inputs, and parameters that were computed; None is skipped.
    """
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in (*tensors, *held_tensors(module)))


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return a view of ``value``; its gradient goes to ``surrogate``, of the same shape, and not to ``value``."""
    return _WithGradientOf.apply(value, surrogate)  # type: ignore[no-untyped-call,no-any-return]


class _WithGradientOf(torch.autograd.Function):
    """The autograd function: value of the first argument, gradient to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        return None, dy
