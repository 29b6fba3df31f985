"""Inputs of the golden record: numbers made from integers, the same on every machine.

`torch.randn` and the default initialisations depend on the instruction set. These values are multiples of a power of
two, so that sums of a few of their products are exact in any order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tritonq.fake_quantize_base import FakeQuantizeBase


def values(*shape: int, seed: int = 0, step: float = 1 / 32, levels: int = 256) -> Tensor:
    """Multiples of ``step`` spread evenly over ``levels`` steps around zero, in scrambled order; float32."""
    mixed = (torch.arange(math.prod(shape)) + 1000003 * (seed + 1)) * 2654435761 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 22468225 % 2**32
    mixed = mixed ^ (mixed >> 13)
    return ((mixed % levels) - levels // 2).float().mul(step).view(shape)


def indices(*shape: int, below: int, seed: int = 0) -> Tensor:
    """Whole numbers from 0 up to ``below`` as int64."""
    return (values(*shape, seed=seed, step=1, levels=below) + below // 2).long()


def fill(model: nn.Module) -> nn.Module:
    """Give ``model`` weights, biases and BatchNorm statistics that don't depend on the machine."""
    for seed, module in enumerate(model.modules()):
        if isinstance(module, FakeQuantizeBase):
            continue
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        with torch.no_grad():
            for name, parameter in module.named_parameters(recurse=False):
                if name in ("weight", "bias"):
                    parameter.copy_(values(*parameter.shape, seed=seed, step=1 / 64, levels=64))
                    if is_norm and name == "weight":
                        parameter.add_(1)
            if is_norm and module.running_var is not None:
                module.running_mean.copy_(values(*module.running_mean.shape, seed=seed, step=1 / 16, levels=16))
                module.running_var.copy_(values(*module.running_var.shape, seed=seed, step=1 / 8, levels=8) + 1)
    return model
