"""Two networks that two cores can train, a residual and a depthwise one, made of exchangeable parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn


class Parts:
    """Makes the layers of the networks in float; subclasses make quantized ones.

    Libraries whose users write quantized layers themselves need it. Every method returns a module whose weights have
    the names of the float layer's, so that the float model's state loads into it.
    """

    def conv(self, inputs: int, outputs: int, size: int, stride: int, groups: int, *, is_first: bool) -> nn.Module:
        """Return a convolution without bias, padded to keep the size; the first one reads the images."""
        return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)

    def activation(self) -> nn.Module:
        """Return the module that follows a BatchNorm or an addition."""
        return nn.ReLU()

    def head(self, inputs: int, classes: int) -> nn.Module:
        """Return the last layer, a linear one, which reads pooled features."""
        return nn.Linear(inputs, classes)


class _Block(nn.Module):
    """Two convolutions whose result is added to the input, or to a projection of it."""

    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = _conv_bn(parts, inputs, outputs, 3, stride)
        self.main = nn.Sequential(*first, parts.activation(), *_conv_bn(parts, outputs, outputs, 3))
        is_plain = stride == 1 and inputs == outputs
        self.side = nn.Identity() if is_plain else nn.Sequential(*_conv_bn(parts, inputs, outputs, 1, stride))
        self.relu = parts.activation()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.relu(self.main(x) + self.side(x)))


def _conv_bn(
    parts: Parts, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, *, is_first: bool = False
) -> list[nn.Module]:
    return [parts.conv(inputs, outputs, size, stride, groups, is_first=is_first), nn.BatchNorm2d(outputs)]


def residual(classes: int, parts: Parts | None = None) -> nn.Module:
    """Return a residual network of 78 thousand parameters."""
    parts = parts or Parts()
    stem = [*_conv_bn(parts, 1, 16, 3, is_first=True), parts.activation(), nn.MaxPool2d(2)]
    blocks = [_Block(parts, 16, 16, 1), _Block(parts, 16, 32, 2), _Block(parts, 32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), parts.head(64, classes))


def depthwise(classes: int, parts: Parts | None = None) -> nn.Module:
    """Return a network of depthwise and pointwise convolutions, some 15 thousand parameters."""
    parts = parts or Parts()
    layers = [*_conv_bn(parts, 1, 16, 3, 2, is_first=True), parts.activation()]
    for inputs, outputs, stride in ((16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2)):
        layers += [*_conv_bn(parts, inputs, inputs, 3, stride, inputs), parts.activation()]
        layers += [*_conv_bn(parts, inputs, outputs, 1), parts.activation()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), parts.head(96, classes))


NETS: dict[str, Callable[..., nn.Module]] = {"residual": residual, "depthwise": depthwise}


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
