"""Put a model's tensors on a device and into a memory format."""

from __future__ import annotations

import torch
from torch import nn


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return ``torch.channels_last``, or ``torch.contiguous_format`` if ``channels_last`` is False."""
    return torch.channels_last if channels_last else torch.contiguous_format


def placed(model: nn.Module, device: torch.device | None = None, *, channels_last: bool) -> nn.Module:
    """Move ``model`` in place to ``device`` (None: it stays) and its convolution weights into a format; return it."""
    moved: nn.Module = model.to(device, memory_format=memory_format(channels_last))  # type: ignore[call-overload]
    return moved
