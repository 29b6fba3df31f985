"""A small residual CNN as a user would write it, without a word about quantization."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """``relu(x + bn2(pointwise(relu(bn1(depthwise(x))))))``, with a depthwise 3×3 and a pointwise 1×1 convolution.

    Args:
        channels: of the input and of the result.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's result, of the shape (n, c, h, w) of its input."""
        y = F.relu(self.bn1(self.depthwise(x)))
        y = self.bn2(self.pointwise(y))
        return F.relu(x + y)


class SmallResNet(nn.Module):
    """Two stages, each of Conv-BN-ReLU and a :class:`ResidualBlock`, then global average pooling and a linear layer.

    Args:
        in_channels: of the images.
        classes: number of logits.
        width: channels of the first stage; the second has twice as many, and half the height and width.
    """

    def __init__(self, in_channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.stem = self._conv(in_channels, width, stride=1)
        self.block1 = ResidualBlock(width)
        self.down = self._conv(width, 2 * width, stride=2)
        self.block2 = ResidualBlock(2 * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, classes)

    @staticmethod
    def _conv(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, classes) for images (n, in_channels, h, w) of any size."""
        x = self.block1(self.stem(x))
        x = self.block2(self.down(x))
        return self.head(self.pool(x).flatten(1))  # type: ignore[no-any-return]
