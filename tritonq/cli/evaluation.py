"""What a classifier answers, and how often it is right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.prepare.record.structure import tensors_in


def first_tensor(output: Any) -> Tensor:
    """The tensor of a model's output, the first one of a tuple, dict or dataclass.

    Raises:
        ValueError: there is none.
    """
    for _, tensor in tensors_in(output):
        return tensor
    raise ValueError(f"the model returns no tensor but a {type(output).__name__}")


@torch.no_grad()
def logits(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """The model's outputs in eval mode, on the CPU; batches go to the device of its tensors."""
    model.eval()
    device = device_of(model)
    outputs = (first_tensor(model(batch.to(device))).cpu() for batch in torch.split(images, batch_size))
    return torch.cat(list(outputs))


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Fraction of rows whose largest entry is the label."""
    return float((outputs.argmax(1) == labels).float().mean())


def share_right(model: nn.Module, batches: Iterable[Any]) -> float:
    """Fraction of images in batches of images and labels whose largest output is the label."""
    right = count = 0
    for images, labels in batches:
        right += int((logits(model, images).argmax(1) == labels).sum())
        count += len(labels)
    return right / count


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors are."""
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
