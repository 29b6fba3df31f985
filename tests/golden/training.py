"""A few training steps of a layer or model, and what they leave behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from golden.inputs import values

_LEARNING_RATE = 1 / 32


def train(model: nn.Module, batch: Callable[[int], tuple[Any, ...]], steps: int = 2) -> dict[str, Any]:
    """Train ``model`` by gradient descent; return its losses, outputs and last gradients.

    Args:
        model: what is called with a batch.
        batch: gives the arguments of a step.
        steps: how many.
    """
    model.train()
    losses, outputs = [], []
    for step in range(steps):
        model.zero_grad()
        arguments = [x.requires_grad_() if x.is_floating_point() else x for x in batch(step)]
        y = model(*arguments)
        outputs.append(y.detach().clone())
        loss = (y.float() * values(*y.shape, seed=step, step=1 / 128)).sum()
        losses.append(loss.detach().clone())
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        gradients |= {f"input {i}": x.grad for i, x in enumerate(arguments) if x.grad is not None}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=_LEARNING_RATE)
    return {"losses": losses, "outputs": outputs, "gradients": gradients}


def evaluate(model: nn.Module, *arguments: Tensor) -> dict[str, Any]:
    """Return what ``model`` gives in eval mode without and with gradients, and these."""
    model.eval()
    with torch.no_grad():
        plain = model(*arguments)
    model.zero_grad()
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in arguments]
    y = model(*leaves)
    y.backward(values(*y.shape, seed=7).to(y.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients |= {f"input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return {"eval": [plain, y.detach()], "eval gradients": gradients}


def trained_and_evaluated(model: nn.Module, *shape: int, steps: int = 2, step: float = 1 / 32) -> dict[str, Any]:
    """Train ``model`` on inputs of ``shape``, evaluate it, and return all of that with its state."""
    parts = train(model, lambda number: (values(*shape, seed=100 + number, step=step),), steps)
    parts["state"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return parts | evaluate(model, values(*shape, seed=50, step=step))


def copied(model: nn.Module, parts: dict[str, Any], *arguments: Tensor) -> dict[str, Any]:
    """Add what a deep copy of ``model`` gives in eval mode."""
    with torch.no_grad():
        return parts | {"copy": copy.deepcopy(model).eval()(*arguments)}
