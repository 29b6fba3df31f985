"""The log of a training run: for each epoch a line on the screen, a row of a CSV file, and values in TensorBoard."""

from __future__ import annotations

import csv
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from tritonq.cli.earlier_fields import required_fields, with_defaults
from tritonq.deploy.files import atomic_file


@dataclass(frozen=True)
class Epoch:
    """What is logged of one epoch.

    Attributes:
        epoch: its number, from 1.
        step: how many steps of the run were done at its end.
        learning_rate: of its last step.
        loss: mean over the images that it trained with.
        accuracy: share of the held-out images, 0 to 1, that the model in eval mode classifies rightly.
    """

    epoch: int
    step: int
    learning_rate: float
    loss: float
    accuracy: float

    def __str__(self) -> str:
        return f"epoch {self.epoch}: loss {self.loss:.4f}, accuracy {self.accuracy:.2%} on the held-out images"


def write_csv(path: Path, history: Sequence[Epoch]) -> None:
    """Write all epochs as CSV, one per row under a row of :class:`Epoch`'s fields, as a whole file or not at all.

    An older file at ``path`` is replaced, so that a resumed run repeats no epoch.

    Raises:
        OSError: the file can't be written; an older one is then as it was.
    """
    text = StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in history)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def is_own_log(path: Path) -> bool:
    """Whether there is no file at ``path``, or one with the first row of :func:`write_csv`, also of earlier versions.

    Raises:
        OSError: what is there can't be read, such as a folder.
    """
    header = ",".join(required_fields(Epoch)).encode()
    if not path.exists():
        return True
    with path.open("rb") as file:
        return file.read(len(header)) == header


def history_from_data(data: Any) -> list[Epoch]:
    """Return the epochs that a checkpoint holds, from ``data``, a list with a dict of :class:`Epoch`'s fields for each.

    A field with a default may be missing, and gets it; so far no field has one. The types of values are not checked.

    Raises:
        ValueError: ``data`` is no list of dicts, or a dict lacks a field without default or has an unknown one.
    """
    names = {field.name for field in fields(Epoch)}
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise ValueError("its history is not one")
    rows = [with_defaults(Epoch, row) for row in data]
    if any(set(row) != names for row in rows):
        raise ValueError("its history is not one")
    return [Epoch(**row) for row in rows]


def check_tensorboard() -> None:
    """Raise ValueError if TensorBoard is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError("--tensorboard needs tensorboard: pip install 'tritonq[tensorboard]'") from error


class TensorBoard:
    """Loss, accuracy and learning rate for TensorBoard, which must be installed.

    Its own writer works in a thread that ends with the first error. Here :meth:`add` writes an epoch at once. If that
    fails, such as on a full disk, it raises OSError, and the next call writes this epoch, too.

    Args:
        folder: where the log's file is written; a missing folder is made.

    Raises:
        OSError: the constructor, which begins the file, can't write it; the error says which file or folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        # All that the file should hold. Nobody else writes to it, so that it holds the beginning of this.
        self._records = BytesIO()
        self._append(file_version="brain.Event:2")

    def add(self, epoch: Epoch) -> None:
        """Write loss, accuracy and learning rate of one epoch, and what could not be written of earlier ones.

        They are the curves ``loss``, ``accuracy`` and ``learning_rate`` over the epoch's number.

        Raises:
            OSError: the file can't be written; the error names it, or the folder that can't be made.
        """
        values = [{"tag": name, "simple_value": getattr(epoch, name)} for name in ("loss", "accuracy", "learning_rate")]
        self._append(step=epoch.epoch, summary={"value": values})

    def _append(self, **fields_of_event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        event = Event(wall_time=time.time(), **fields_of_event)
        RecordWriter(self._records).write(event.SerializeToString())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._path.open("ab") as file:
                file.write(self._records.getvalue()[file.tell() :])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
