"""Backward functions without a second derivative: a second differentiation raises an error instead of giving zeros."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_NO_SECOND_DERIVATIVE = (
    "quantized layers have no second derivative: compute gradient penalties (WGAN-GP, R1) and Hessians with the float "
    "model"
)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a ``backward`` of a ``torch.autograd.Function``: differentiating its gradients raises RuntimeError.

    torch's own ``once_differentiable`` raises only if the incoming gradient requires a gradient itself. The gradient of
    ``y.sum()``, a constant 1, does not, so that a gradient penalty would silently count as a constant. It still does in
    graphs of ``torch.compile``, which do not raise.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return found
        values = [_tracked(value) for value in (found if isinstance(found, tuple) else (found,))]
        refusing: tuple[Any, ...] = _Refusing.apply(*values)  # type: ignore[no-untyped-call]
        return refusing if isinstance(found, tuple) else refusing[0]

    return wrapper


def _tracked(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) else value


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Any, ...]:
        return tuple(value.view_as(value) if isinstance(value, Tensor) else value for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(_NO_SECOND_DERIVATIVE)
