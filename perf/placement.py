"""Where a model's tensors lie: device and memory format."""

from __future__ import annotations

import torch
from torch import nn


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return torch's value for one of the two layouts of images."""
    return torch.channels_last if channels_last else torch.contiguous_format


def placed(model: nn.Module, device: torch.device | None = None, *, channels_last: bool) -> nn.Module:
    """Move a model in place, where ``device`` is given, and lay its convolution weights out; return it."""
    moved: nn.Module = model.to(device, memory_format=memory_format(channels_last))  # type: ignore[call-overload]
    return moved
