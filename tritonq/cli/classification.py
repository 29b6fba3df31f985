"""Run a classifier over images: its logits, its predictions and its accuracy; `evaluate.py` is the command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tritonq.cli.folder import LabelledImages
from tritonq.cli.image_files import UnreadableImageError
from tritonq.cli.interrupts import leave_to_parent
from tritonq.prepare.record.structure import tensors_in

BATCH_OF_EVALUATION = 256


def first_tensor(output: Any) -> Tensor:
    """Return the tensor in a model's output: itself, or the first one in nested tuples, lists, dicts or dataclasses.

    Raises:
        ValueError: there is none.
    """
    for _, tensor in tensors_in(output):
        return tensor
    raise ValueError(f"the model returns no tensor but a {type(output).__name__}")


@torch.no_grad()
def logits(model: nn.Module, images: Tensor, batch_size: int = BATCH_OF_EVALUATION) -> Tensor:
    """Return the model's outputs for ``images`` on the CPU, without gradients; of several outputs the first tensor.

    The model is switched to eval mode and stays in it. Batches are moved to its device.

    Args:
        model: the model.
        images: float32 (n, channels, height, width).
        batch_size: most images in one call.

    Raises:
        ValueError: the model returns no tensor.
    """
    model.eval()
    device = device_of(model)
    outputs = (first_tensor(model(batch.to(device))).cpu() for batch in torch.split(images, batch_size))
    return torch.cat(list(outputs))


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Return the fraction of rows in ``outputs`` (n, classes) whose largest entry is at the label; NaN without rows.

    ``labels`` are int64 (n,), on the device of ``outputs``.
    """
    return float((outputs.argmax(1) == labels).float().mean())


def count_right(answer: Callable[[Tensor], Tensor], batches: Iterable[Any]) -> tuple[int, int]:
    """Return for how many images the label's output is the largest, and how many images there are.

    Args:
        answer: from a batch of images to outputs (n, classes), on the labels' device.
        batches: pairs of images and labels.
    """
    right = count = 0
    for images, labels in batches:
        right += int((answer(images).argmax(1) == labels).sum())
        count += len(labels)
    return right, count


def share_right(model: nn.Module, batches: Iterable[Any]) -> float:
    """Return the fraction of images in ``batches`` (pairs of images and labels) whose largest output is the label's.

    The model is switched to eval mode and stays in it; of several outputs the first tensor counts. Labels must be on
    the CPU; images may be on any device. There must be at least one image.

    Raises:
        ValueError: the model returns no tensor.
    """
    right, count = count_right(lambda images: logits(model, images), batches)
    return right / count


class Batches:
    """An iterable of batches: pairs of images, float32 (n, channels, height, width), and labels, int64 (n,).

    It has no length. Each iteration reads ``loader`` from the start.

    Args:
        loader: gives these pairs. If it can't read an image, even in a worker process, the iteration raises an
            :class:`UnreadableImageError` with a message of one line.
    """

    def __init__(self, loader: DataLoader[tuple[Tensor, int]]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the batches.

        Raises:
            UnreadableImageError: a file can't be read any more; the message is one line.
        """
        try:
            yield from self._loader
        except UnreadableImageError as error:
            # From a worker process comes its traceback, whose last line begins with the class.
            reason = str(error).strip().splitlines()[-1].rpartition(f"{UnreadableImageError.__name__}: ")[2]
            raise UnreadableImageError(reason) from error


def batches_of(
    images: LabelledImages,
    batches: list[list[int]],
    workers: int,
    device: torch.device | None = None,
) -> Batches:
    """Return the images with the indices in ``batches``, one pair (images, labels) for each list, on the CPU.

    Images are float32 (n, channels, height, width), labels int64 (n,). The loader that reads them has a random
    generator of its own, so that the training's is not used.

    Args:
        images: the data set.
        batches: lists of indices into ``images``; a batch has the order of its list.
        workers: processes that read images; 0: this one.
        device: where the caller will move the batches; for a CUDA device they are in pinned memory, else (None: not
            known) they are not.
    """
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device is not None and device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=leave_to_parent,
    )
    return Batches(loader)


def in_order(images: LabelledImages, workers: int, rank: int = 0, ranks: int = 1) -> Batches:
    """Return batches of all images in order, with their labels: pairs of at most 256 images and 256 labels.

    Where ``ranks`` processes share the images, number ``rank`` (from 0) gets those with the indices ``rank``,
    ``rank + ranks``, ``rank + 2 · ranks`` and so on. ``workers`` processes read the images; 0: this one.
    """
    chunks = torch.split(torch.arange(rank, len(images), ranks), BATCH_OF_EVALUATION)
    return batches_of(images, [chunk.tolist() for chunk in chunks if len(chunk)], workers)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter, or else of its first buffer; the CPU for one without either."""
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
