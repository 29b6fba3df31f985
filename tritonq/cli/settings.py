"""The settings that decide the numbers of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Each epoch of each seed gets a 64-bit number of its own.
_SEED_BITS = 40
AMP = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run, besides the model: a resumed run must have the same.

    Attributes:
        data: fingerprint of the images (:class:`~tritonq.cli.data.Examples`); ``""`` until they are read.
        epochs: how many in all.
        frozen_epochs: how many of these, the last ones, are trained with frozen ranges and BatchNorm statistics.
        batch_size: images per step, of all processes together.
        learning_rate: at the start of the schedule, from which it falls to 0.
        seed: of the order of images, of augmentation and of dropout.
        amp: autocast: ``"off"``, ``"bfloat16"`` or ``"float16"``, which also scales gradients.
        augment: random changes of training images, such as ``"flip,crop"``; ``"none"`` for no change.
        begin: how many epochs were done when the schedule of the learning rate began: 0, or, if a finished run was
            given more epochs, those that it had.

    Raises:
        ValueError: fewer than one epoch or two images per step, a seed of more than 40 bits, a learning rate that is
            negative or not finite, or a number of frozen epochs that is negative or not below that of epochs.
    """

    data: str
    epochs: int
    frozen_epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    amp: str
    augment: str = "none"
    begin: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("frozen_epochs", 0), ("batch_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name.replace('_', ' ')} must be at least {least}, got {getattr(self, name)}")
        if self.seed.bit_length() > _SEED_BITS:
            raise ValueError(f"seed must have at most {_SEED_BITS} bits, got {self.seed}")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning rate must be a number from 0, got {self.learning_rate}")
        if self.frozen_epochs >= self.epochs:
            raise ValueError(f"of {self.epochs} epochs fewer can be frozen, got {self.frozen_epochs}")

    def check_shares(self, processes: int) -> None:
        """Raise ValueError if ``batch_size`` is less than two images for each of so many processes."""
        if self.batch_size < 2 * processes:
            raise ValueError(f"batch size {self.batch_size} gives {processes} processes less than two images each")

    def steps_per_epoch(self, images: int, processes: int = 1) -> int:
        """Return how many steps an epoch of ``images`` images has; at least 1.

        A last batch of less than two images for each of the ``processes`` is too small for BatchNorm: it is left out,
        unless it is the only one. Each epoch has another order of images, and so leaves out others.
        """
        return max(1, images // self.batch_size + (images % self.batch_size >= 2 * processes))

    def learning_rate_at(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step: ``learning_rate · (1 + cos(π p)) / 2``.

        p is ``(step / steps_per_epoch - begin) / (epochs - begin)``: 0 where the schedule began, 1 after the last
        epoch. ``step`` is counted from 0 at the first step of the whole run, whatever ``begin`` is.
        """
        first, last = self.begin * steps_per_epoch, self.epochs * steps_per_epoch
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - first) / (last - first)))
