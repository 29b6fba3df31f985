"""Fake quantization written out in a few lines, in the dtype of its input: what float64 comparisons rest on."""

import torch
from torch import nn


def straight_through(x, steps, low, high, scale):
    """Return ``clamp(steps, low, high) * scale`` with the gradient of ``x`` where ``steps`` is in range."""
    y = steps.clamp(low, high) * scale
    inside = (steps >= low) & (steps <= high)
    return torch.where(inside, x - (x - y).detach(), y.detach())


class WrittenWeight(nn.Module):
    """Narrow symmetric 8 bits per row, the scale of the present weight in training: tritonq's "tensorrt" weights."""

    def forward(self, w):
        if self.training:
            largest = w.detach().abs().flatten(1).amax(1).float()
            self.scale = (largest / 127).clamp(min=torch.finfo(torch.float32).eps)
        scale = self.scale.to(w.dtype).view(-1, *[1] * (w.dim() - 1))
        return straight_through(w, (w * (1 / scale.float()).to(w.dtype)).round(), -127, 127, scale)


class WrittenActivation(nn.Module):
    """Symmetric 8 bits, moving average of the range: tritonq's "tensorrt" activations."""

    def __init__(self):
        super().__init__()
        self.low = self.high = None

    def forward(self, x):
        if self.training:
            low, high = x.detach().amin().float(), x.detach().amax().float()
            if self.low is None:
                self.low, self.high = low, high
            else:
                self.low = self.low + 0.01 * (low - self.low)
                self.high = self.high + 0.01 * (high - self.high)
        scale = torch.maximum(-self.low.clamp(max=0), self.high.clamp(min=0)) / 127.5
        scale = scale.clamp(min=torch.finfo(torch.float32).eps).to(x.dtype)
        return straight_through(x, (x * (1 / scale.float()).to(x.dtype)).round(), -128, 127, scale)
