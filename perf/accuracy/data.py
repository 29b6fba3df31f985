"""Fashion-MNIST from a folder of its four idx files, and a harder task made from it."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_MEAN, _DEVIATION = 0.286, 0.353
CLASSES = 10
# The harder task: so many garments on a canvas of so many pixels, at scales from these bounds.
_GARMENTS, _CANVAS, _SCALES = 4, 64, (0.6, 1.2)


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        images: float32 (n, 1, height, width).
        targets: int64 (n,), or float32 (n, classes) if an image has several labels.
    """

    images: Tensor
    targets: Tensor

    def first(self, count: int) -> Split:
        """Return the first ``count`` images with their targets."""
        return Split(self.images[:count], self.targets[:count])


@dataclass(frozen=True)
class Task:
    """A data set in three parts.

    Attributes:
        train: for training.
        validation: to choose recipes by.
        test: for the reported accuracy; read once.
    """

    train: Split
    validation: Split
    test: Split


def read_idx(path: Path) -> np.ndarray:
    """Return the bytes in a file in idx form as an array; the file may have ``.gz`` after its name.

    Raises:
        ValueError: not such a file.
        OSError: no file.
    """
    packed = path.with_name(f"{path.name}.gz")
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of bytes")
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} holds {values.size} bytes for the shape {shape}")
    return values.reshape(shape)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write an array of bytes in idx form."""
    path.write_bytes(
        b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    )


def load(
    folder: Path,
    train: int,
    held_out: int,
    tested: int | None = None,
    *,
    several_labels: bool = False,
    seed: int = 0,
) -> Task:
    """Return the data of a task: training images, validation images (the last of the training set), and test images.

    Args:
        folder: with the four files of Fashion-MNIST or MNIST; Debian's package dataset-fashion-mnist has them.
        train: number of images to train with, the first ones.
        held_out: number of images for validation.
        tested: number of test images; None: as many as for validation.
        several_labels: paste four garments at random places and scales on a cluttered canvas of 64 × 64 pixels; the
            target says which classes are there.
        seed: of the canvases.

    Raises:
        ValueError: fewer images than asked for.
        OSError: a file is missing.
    """
    tested = held_out if tested is None else tested
    arrays = [read_idx(folder / name) for name in _NAMES]
    if len(arrays[0]) < train + held_out or len(arrays[2]) < tested:
        raise ValueError(f"{folder} has {len(arrays[0])} and {len(arrays[2])} images, fewer than asked for")
    parts = (
        Split(*_tensors(arrays[0][:train], arrays[1][:train])),
        Split(*_tensors(arrays[0][-held_out:], arrays[1][-held_out:])),
        Split(*_tensors(arrays[2][:tested], arrays[3][:tested])),
    )
    if several_labels:
        parts = tuple(pasted(part, len(part.images), seed + index) for index, part in enumerate(parts))  # type: ignore[assignment]
    return Task(*(Split((part.images - _MEAN) / _DEVIATION, part.targets) for part in parts))


def pasted(garments: Split, count: int, seed: int) -> Split:
    """Return ``count`` canvases with four of the garments each, on strips of others as clutter; values in 0..1."""
    random = np.random.default_rng(seed)
    canvases = torch.zeros(count, 1, _CANVAS, _CANVAS)
    targets = torch.zeros(count, CLASSES)
    for canvas, target in zip(canvases[:, 0], targets, strict=True):
        for index in random.integers(len(garments.images), size=2 * _GARMENTS):  # clutter: strips, of no class
            strip = garments.images[index, 0, : int(random.integers(4, 9))] * 0.5
            _paste(canvas, strip, random)
        for index in random.integers(len(garments.images), size=_GARMENTS):
            size = int(28 * random.uniform(*_SCALES))
            garment = F.interpolate(garments.images[index][None], size=(size, size), mode="bilinear")[0, 0]
            _paste(canvas, garment, random)
            target[garments.targets[index]] = 1.0
    return Split(canvases, targets)


def _paste(canvas: Tensor, part: Tensor, random: np.random.Generator) -> None:
    top, left = (int(random.integers(_CANVAS - size + 1)) for size in part.shape)
    place = canvas[top : top + part.shape[0], left : left + part.shape[1]]
    place.copy_(torch.maximum(place, part))


def generate(folder: Path, train: int, test: int, seed: int = 0) -> None:
    """Write generated data in the form of Fashion-MNIST: bright bars in noise, whose place is their class."""
    random = np.random.default_rng(seed)
    for (images_name, labels_name), count in ((_NAMES[:2], train), (_NAMES[2:], test)):
        labels = random.integers(CLASSES, size=count).astype(np.uint8)
        images = random.integers(90, size=(count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            rows, start = image if label < 5 else image.T, 2 + 5 * int(label % 5)
            rows[start : start + 4] += 120
        write_idx(folder / images_name, images)
        write_idx(folder / labels_name, labels)


def _tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images.copy()).float().unsqueeze(1) / 255, torch.from_numpy(labels.astype(np.int64))
