"""An ordinary training loop, in which nothing is specific to quantization."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from tritonq.cli.classification import accuracy, logits
from tritonq.cli.data import Images

__all__ = ["History", "accuracy", "logits", "train"]


@dataclass(frozen=True)
class History:
    """Losses and times of a training run, one entry per epoch.

    Attributes:
        losses: mean over the images of the loss with which each was trained in the epoch.
        seconds: how long the epoch took.
    """

    losses: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def seconds_per_epoch(self) -> float:
        """Median of the seconds that an epoch took.

        Raises:
            statistics.StatisticsError: there was no epoch.
        """
        return statistics.median(self.seconds)


def train(
    model: nn.Module,
    data: Images,
    *,
    epochs: int,
    learning_rate: float,
    label: str,
    batch_size: int = 32,
    seed: int = 0,
    before_epoch: Callable[[int], None] | None = None,
) -> History:
    """Train ``model`` in place on the training images of ``data`` by cross entropy; return a `History` of it.

    The optimizer is SGD with Nesterov momentum 0.9 and weight decay 1e-4. Over all steps the learning rate falls to 0,
    along half a cosine.

    Args:
        model: a classifier on the CPU; it ends in training mode.
        data: the images.
        epochs: passes over the training images.
        learning_rate: at the start.
        label: text of the progress bar.
        batch_size: images per step; the last step of an epoch may have fewer.
        seed: of the order of the images in each epoch.
        before_epoch: called with the index of each epoch, from 0, before it begins, for example to freeze ranges.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    batches = -(-len(data.train_labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    generator = torch.Generator().manual_seed(seed)
    losses, seconds = [], []
    progress = tqdm(range(epochs), desc=label, unit="epoch", disable=None)
    for epoch in progress:
        if before_epoch is not None:
            before_epoch(epoch)
        model.train()
        start = time.perf_counter()
        total = 0.0
        for batch in torch.split(torch.randperm(len(data.train_labels), generator=generator), batch_size):
            loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        seconds.append(time.perf_counter() - start)
        losses.append(total / len(data.train_labels))
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
    return History(tuple(losses), tuple(seconds))
