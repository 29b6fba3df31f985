"""The log of a training run: for each epoch a line on the screen, a row of a CSV file, and values in TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

from tritonq.deploy.files import atomic_file


@dataclass(frozen=True)
class Epoch:
    """What is logged of one epoch.

    Attributes:
        epoch: its number, from 1.
        step: how many steps were done at its end.
        learning_rate: of its last step.
        loss: mean over its images.
        accuracy: of the model in eval mode, on the held-out images.
    """

    epoch: int
    step: int
    learning_rate: float
    loss: float
    accuracy: float

    def __str__(self) -> str:
        return f"epoch {self.epoch}: loss {self.loss:.4f}, accuracy {self.accuracy:.2%} on the held-out images"


def write_csv(path: Path, history: Sequence[Epoch]) -> None:
    """Write all epochs, one per row, as a whole file; so a resumed run repeats none."""
    text = StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in history)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def history_from_data(data: Any) -> list[Epoch]:
    """Return the epochs that a checkpoint holds, from the list of their fields."""
    return [Epoch(**row) for row in data]


def check_tensorboard() -> None:
    """Raise ValueError if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError("--tensorboard needs tensorboard: pip install 'tritonq[tensorboard]'") from error


class TensorBoard:
    """Loss, accuracy and learning rate for TensorBoard, which must be installed.

    Args:
        folder: where the log's files are written.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(folder)

    def add(self, epoch: Epoch) -> None:
        """Write the values of one epoch."""
        for name in ("loss", "accuracy", "learning_rate"):
            self._writer.add_scalar(name, getattr(epoch, name), epoch.epoch)
        self._writer.flush()
