"""Networks with dense outputs, in a few lines each: a U-Net, and a detector of YOLO's kind (C2f, SPPF, PAN neck)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_UNET_CHANNELS = (16, 32, 64, 128)
_YOLO_CHANNELS = (16, 32, 64, 128, 256)


def _row(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


class UNet(nn.Module):
    """Encoder and decoder with transposed convolutions and concatenated skips, one output channel.

    Source: Ronneberger et al. (2015), with BatchNorm and padding.
    """

    def __init__(self) -> None:
        super().__init__()
        down = zip((3, *_UNET_CHANNELS), _UNET_CHANNELS, strict=False)
        self.down = nn.ModuleList(nn.Sequential(_row(a, b), _row(b, b)) for a, b in down)
        pairs = [*pairwise(_UNET_CHANNELS)][::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairs)
        self.merge = nn.ModuleList(nn.Sequential(_row(2 * a, a), _row(a, a)) for a, _ in pairs)
        self.head = nn.Conv2d(_UNET_CHANNELS[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 1, h, w) for images (n, 3, h, w); h and w are multiples of 8."""
        skips: list[Tensor] = []
        for index, block in enumerate(self.down):
            x = block(x if index == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], 1))
        y: Tensor = self.head(x)
        return y


class C2f(nn.Module):
    """Split channels; each bottleneck adds to its part, and all parts are concatenated. Source: Ultralytics."""

    def __init__(self, inputs: int, outputs: int, count: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.shortcut = shortcut
        self.first, self.last = _row(inputs, outputs, 1, act=nn.SiLU), _row((2 + count) * half, outputs, 1, act=nn.SiLU)
        rows = (nn.Sequential(_row(half, half, act=nn.SiLU), _row(half, half, act=nn.SiLU)) for _ in range(count))
        self.rows = nn.ModuleList(rows)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor (n, outputs, h, w) for one of (n, inputs, h, w)."""
        parts = list(self.first(x).chunk(2, 1))
        for row in self.rows:
            parts.append(parts[-1] + row(parts[-1]) if self.shortcut else row(parts[-1]))
        y: Tensor = self.last(torch.cat(parts, 1))
        return y


class SPPF(nn.Module):
    """Three max-pools in a row, concatenated. Source: Ultralytics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = (
            _row(a, b, 1, act=nn.SiLU) for a, b in ((channels, channels // 2), (channels * 2, channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        y: Tensor = self.last(torch.cat(parts, 1))
        return y


class Detector(nn.Module):
    """A backbone of C2f blocks, SPPF, a neck that goes up and down again, and a head on three levels.

    Source: the outline of Ultralytics' YOLOv8n.
    """

    def __init__(self, outputs: int = 16) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = _YOLO_CHANNELS
        self.stem = nn.Sequential(_row(3, c1, 3, 2, nn.SiLU), _row(c1, c2, 3, 2, nn.SiLU), C2f(c2, c2))
        self.p3 = nn.Sequential(_row(c2, c3, 3, 2, nn.SiLU), C2f(c3, c3))
        self.p4 = nn.Sequential(_row(c3, c4, 3, 2, nn.SiLU), C2f(c4, c4))
        self.p5 = nn.Sequential(_row(c4, c5, 3, 2, nn.SiLU), C2f(c5, c5), SPPF(c5))
        self.up4, self.up3 = C2f(c5 + c4, c4, shortcut=False), C2f(c4 + c3, c3, shortcut=False)
        self.to4, self.down4 = _row(c3, c3, 3, 2, nn.SiLU), C2f(c3 + c4, c4, shortcut=False)
        self.to5, self.down5 = _row(c4, c4, 3, 2, nn.SiLU), C2f(c4 + c5, c5, shortcut=False)
        heads = (nn.Sequential(_row(c, c3, act=nn.SiLU), nn.Conv2d(c3, outputs, 1)) for c in (c3, c4, c5))
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        """Return predictions (n, outputs, places) for images (n, 3, h, w); h and w are multiples of 32.

        The places are those of strides 8, 16 and 32.
        """
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.up4(torch.cat([F.interpolate(p5, scale_factor=2), p4], 1))
        n3 = self.up3(torch.cat([F.interpolate(n4, scale_factor=2), p3], 1))
        n4 = self.down4(torch.cat([self.to4(n3), n4], 1))
        n5 = self.down5(torch.cat([self.to5(n4), p5], 1))
        found = [head(level).flatten(2) for head, level in zip(self.heads, (n3, n4, n5), strict=True)]
        return torch.cat(found, 2)
