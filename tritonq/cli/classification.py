"""Run a classifier over images: its logits, its predictions and its accuracy; `evaluate.py` is the command."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tritonq.cli.folder import LabelledImages
from tritonq.cli.interrupts import leave_to_parent
from tritonq.prepare.record.structure import tensors_in

BATCH_OF_EVALUATION = 256


def first_tensor(output: Any) -> Tensor:
    """Return the tensor of a model's output, the first one of a tuple, dict or dataclass.

    Raises:
        ValueError: there is none.
    """
    for _, tensor in tensors_in(output):
        return tensor
    raise ValueError(f"the model returns no tensor but a {type(output).__name__}")


@torch.no_grad()
def logits(model: nn.Module, images: Tensor, batch_size: int = BATCH_OF_EVALUATION) -> Tensor:
    """Return the model's outputs in eval mode, on the CPU; batches go to the device of its tensors."""
    model.eval()
    device = device_of(model)
    outputs = (first_tensor(model(batch.to(device))).cpu() for batch in torch.split(images, batch_size))
    return torch.cat(list(outputs))


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Return fraction of rows whose largest entry is the label."""
    return float((outputs.argmax(1) == labels).float().mean())


def count_right(answer: Callable[[Tensor], Tensor], batches: Iterable[Any]) -> tuple[int, int]:
    """Return how many images are answered with their label, and how many there are."""
    right = count = 0
    for images, labels in batches:
        right += int((answer(images).argmax(1) == labels).sum())
        count += len(labels)
    return right, count


def share_right(model: nn.Module, batches: Iterable[Any]) -> float:
    """Return fraction of images in batches of images and labels whose largest output is the label."""
    right, count = count_right(lambda images: logits(model, images), batches)
    return right / count


def batches_of(
    images: LabelledImages,
    batches: list[list[int]],
    workers: int,
    device: torch.device | None = None,
) -> DataLoader[tuple[Tensor, int]]:
    """Return batches of images, by index. Its own random generator leaves the training's alone."""
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device is not None and device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=leave_to_parent,
    )


def in_order(images: LabelledImages, workers: int, rank: int = 0, ranks: int = 1) -> DataLoader[tuple[Tensor, int]]:
    """Return all images once, or every ``ranks``-th of them."""
    chunks = torch.split(torch.arange(rank, len(images), ranks), BATCH_OF_EVALUATION)
    return batches_of(images, [chunk.tolist() for chunk in chunks if len(chunk)], workers)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's tensors are."""
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
