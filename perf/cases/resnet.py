"""ResNet for machines without torchvision: the same modules under the same names, in two forms.

Source: He et al., "Deep Residual Learning for Image Recognition", 2015; the stride lies on the 3×3 convolution and the
names are torchvision's, so that weights and results are too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules, fuse_modules_qat

_WIDTHS = (64, 128, 256, 512)


class Block(nn.Module):
    """Two 3×3 convolutions, or with ``bottleneck`` a 1×1, a 3×3 and a 1×1 one, and the addition of the input."""

    def __init__(self, inputs: int, width: int, stride: int, *, bottleneck: bool, quantizable: bool) -> None:
        super().__init__()
        outputs = width * (4 if bottleneck else 1)
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        channels = (inputs, *[width] * (len(kernels) - 1), outputs)
        for i, (kernel, step) in enumerate(zip(kernels, strides, strict=True), start=1):
            setattr(self, f"conv{i}", _conv(channels[i - 1], channels[i], kernel, step))
            setattr(self, f"bn{i}", nn.BatchNorm2d(channels[i]))
            # torch.ao fuses modules, so that each convolution needs a ReLU module of its own.
            if quantizable and i < len(kernels):
                setattr(self, f"relu{i}", nn.ReLU())
        self.depth = len(kernels)
        self.relu: nn.ReLU | None = None if quantizable else nn.ReLU(inplace=True)
        self.addition = FloatFunctional() if quantizable else None
        changes = stride != 1 or inputs != outputs
        self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor (batch, outputs, h / stride, w / stride) for one of (batch, inputs, h, w)."""
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.depth:
                y = (self.relu or getattr(self, f"relu{i}"))(y)
        shortcut = x if self.downsample is None else self.downsample(x)
        y = y + shortcut if self.addition is None else self.addition.add_relu(y, shortcut)
        return y if self.relu is None else cast(Tensor, self.relu(y))

    def fuse(self, fuser: Callable[..., object]) -> None:
        """Fuse convolutions with what follows them, for torch.ao."""
        for i in range(1, self.depth + 1):
            fuser(self, [f"conv{i}", f"bn{i}", *([f"relu{i}"] if i < self.depth else [])], inplace=True)
        if self.downsample is not None:
            fuser(self.downsample, ["0", "1"], inplace=True)


class ResNet(nn.Module):
    """A ResNet for images of three channels.

    Args:
        depths: blocks per stage: (2, 2, 2, 2) for ResNet-18, (3, 4, 6, 3) for ResNet-50.
        bottleneck: three convolutions per block.
        num_classes: number of logits.
        quantizable: stubs, one ReLU module per convolution and ``FloatFunctional`` additions, as torch.ao needs them.
    """

    def __init__(self, depths: Sequence[int], *, bottleneck: bool, num_classes: int, quantizable: bool = False) -> None:
        super().__init__()
        self.conv1 = _conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = 64
        for stage, (width, depth) in enumerate(zip(_WIDTHS, depths, strict=True), start=1):
            blocks = []
            for i in range(depth):
                stride = 2 if i == 0 and stage > 1 else 1
                blocks.append(Block(inputs, width, stride, bottleneck=bottleneck, quantizable=quantizable))
                inputs = width * (4 if bottleneck else 1)
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        self.quant = QuantStub() if quantizable else nn.Identity()
        self.dequant = DeQuantStub() if quantizable else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes) of images (batch, 3, h, w)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.quant(x)))))
        for stage in range(1, len(_WIDTHS) + 1):
            x = getattr(self, f"layer{stage}")(x)
        logits: Tensor = self.dequant(self.fc(torch.flatten(self.avgpool(x), 1)))
        return logits

    def fuse_model(self, is_qat: bool) -> None:
        """Fuse all convolutions, as torchvision's quantizable models do."""
        fuser: Callable[..., object] = fuse_modules_qat if is_qat else fuse_modules
        fuser(self, ["conv1", "bn1", "relu"], inplace=True)
        for module in self.modules():
            if isinstance(module, Block):
                module.fuse(fuser)


def resnet(name: str, num_classes: int, *, quantizable: bool = False) -> ResNet:
    """Return ``"resnet18"`` or ``"resnet50"``.

    Raises:
        ValueError: another name.
    """
    known = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}
    if name not in known:
        raise ValueError(f"without torchvision there are {' and '.join(known)}, not {name}")
    depths, bottleneck = known[name]
    return ResNet(depths, bottleneck=bottleneck, num_classes=num_classes, quantizable=quantizable)


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
