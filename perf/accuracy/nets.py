"""Networks that are small enough for two cores: a residual and a depthwise one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn


def _conv_bn(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class _Block(nn.Module):
    """Two convolutions beside an identity or a projection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(*_conv_bn(inputs, outputs, 3, stride), nn.ReLU(), *_conv_bn(outputs, outputs, 3))
        is_plain = stride == 1 and inputs == outputs
        self.side = nn.Identity() if is_plain else nn.Sequential(*_conv_bn(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.side(x))


def residual(classes: int) -> nn.Module:
    """Return a residual network of 78 thousand parameters."""
    stem = [*_conv_bn(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2)]
    blocks = [_Block(16, 16, 1), _Block(16, 32, 2), _Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def depthwise(classes: int) -> nn.Module:
    """Return a network of depthwise and pointwise convolutions, some 15 thousand parameters."""
    layers = [*_conv_bn(1, 16, 3, 2), nn.ReLU()]
    for inputs, outputs, stride in ((16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2)):
        layers += [*_conv_bn(inputs, inputs, 3, stride, groups=inputs), nn.ReLU()]
        layers += [*_conv_bn(inputs, outputs, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, classes))


NETS: dict[str, Callable[[int], nn.Module]] = {"residual": residual, "depthwise": depthwise}


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return cast(int, sum(parameter.numel() for parameter in model.parameters()))
