"""LSQ as in its paper, written in a few lines of PyTorch, with BatchNorms left as they are.

tritonq's own LSQ, which rounds weights that BatchNorms can be folded into, is compared with it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.perf.accuracy.nets import Parts


class Step(nn.Module):
    """``round(clip(x/s)) s`` with a trained s, one for all values (weights of a layer or activations).

    s begins at ``2 mean|x| / sqrt(quant_max)`` of the first batch; its gradient is multiplied by
    ``1/sqrt(N quant_max)``, where N counts weights, or the features of one sample.

    Source: Esser et al., "Learned Step Size Quantization" (2020), sections 2.1 and 2.2.
    """

    begun: Tensor

    def __init__(self, quant_min: int, quant_max: int, *, of_batches: bool) -> None:
        super().__init__()
        self.limits, self.of_batches = (quant_min, quant_max), of_batches
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        quant_max = self.limits[1]
        if not self.begun:
            self.scale.data.copy_(2 * x.detach().abs().mean() / math.sqrt(quant_max))
            self.begun.fill_(True)
        count = x.numel() / (len(x) if self.of_batches else 1)
        scale = _with_gradient(self.scale, 1 / math.sqrt(count * quant_max))
        clipped = (x / scale).clamp(*self.limits)
        return (clipped + (clipped.round() - clipped).detach()) * scale


def _with_gradient(parameter: Tensor, factor: float) -> Tensor:
    """Return ``parameter`` with a gradient that is multiplied by ``factor``."""
    scaled = parameter * factor
    return (parameter - scaled).detach() + scaled


def _weight_step(bits: int) -> Step:
    half = 2 ** (bits - 1)
    return Step(-half, half - 1, of_batches=False)


def _activation_step(bits: int) -> Step:
    return Step(0, 2**bits - 1, of_batches=True)


class _Conv(nn.Conv2d):
    step: Step

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(x, self.step(self.weight), self.bias))


class _Head(nn.Linear):
    step: Step
    input_step: Step

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_step(x), self.step(self.weight), self.bias)


class StepParts(Parts):
    """Layers quantized by LSQ.

    The weights of the first and the last layer, and the input of the last, have 8 bits; images are bytes anyway.
    """

    def __init__(self, weights: int, activations: int) -> None:
        self.weights, self.activations = weights, activations

    def conv(self, inputs: int, outputs: int, size: int, stride: int, groups: int, *, is_first: bool) -> nn.Module:
        """Return a convolution whose weight is rounded by LSQ; in the first one it has 8 bits."""
        conv = _Conv(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        conv.step = _weight_step(8 if is_first else self.weights)
        return conv

    def activation(self) -> nn.Module:
        """Return a ReLU, and behind it LSQ's rounding of its result."""
        return nn.Sequential(nn.ReLU(), _activation_step(self.activations))

    def head(self, inputs: int, classes: int) -> nn.Module:
        """Return a linear layer whose weight and input are rounded to 8 bits by LSQ."""
        head = _Head(inputs, classes)
        head.step, head.input_step = _weight_step(8), _activation_step(8)
        return head
