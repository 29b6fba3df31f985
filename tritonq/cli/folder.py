"""A folder of images with one sub-folder per class, read file by file."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
COLOURS = 3


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images float32 (channels, height, width), each with its label."""

    @abstractmethod
    def __len__(self) -> int:
        """How many."""


@dataclass(frozen=True)
class Examples:
    """What a model is trained on and measured with.

    Attributes:
        name: where they come from.
        classes: class names by label.
        train: normalised to mean 0 and deviation 1.
        test: normalised likewise.
    """

    name: str
    classes: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages


class FileImages(LabelledImages):
    """Images that are read from their files each time.

    Attributes:
        paths: the files.
        labels: of each.
        size: side to scale to.
        mean: of the pixels 0..255, which becomes 0.
        std: their deviation, which becomes 1.
    """

    def __init__(self, paths: list[Path], labels: list[int], size: int, mean: float, std: float) -> None:
        self.paths, self.labels, self.size, self.mean, self.std = paths, labels, size, mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image and its label."""
        return (read_pixels(self.paths[index], self.size).float() - self.mean) / self.std, self.labels[index]


def open_folder(folder: Path, size: int) -> Examples:
    """The images in ``folder/<class>/*``, scaled to ``size`` × ``size`` RGB; every second one of a class is held out.

    Each file is read once to tell whether it can be, and for mean and deviation; no pixels are kept.

    Raises:
        ValueError: see :func:`readable_images`.
    """
    paths: list[Path] = []
    labels: list[int] = []
    sums: list[tuple[int, int]] = []
    for path, label, pixels in readable_images(folder, size):
        paths.append(path)
        labels.append(label)
        wide = pixels.long()
        sums.append((int(wide.sum()), int(wide.square().sum())))
    train, test = deal(torch.tensor(labels), seed=0)
    count = len(train) * COLOURS * size * size
    total, squares = (sum(sums[index][moment] for index in train.tolist()) for moment in (0, 1))
    mean = total / count
    std = max((squares / count - mean**2) * count / (count - 1), 1e-12) ** 0.5

    def part(indices: Tensor) -> FileImages:
        chosen = indices.tolist()
        return FileImages([paths[i] for i in chosen], [labels[i] for i in chosen], size, mean, std)

    return Examples(folder.name, class_names(folder), part(train), part(test))


def readable_images(folder: Path, size: int) -> Iterator[tuple[Path, int, Tensor]]:
    """Path, label and pixels of every image in ``folder/<class>/*``, sorted.

    Files that are no image are named on stderr, counted and skipped.

    Raises:
        ValueError: no such folder, fewer than two classes, or a class with fewer than two readable images.
    """
    skipped = read = 0
    for label, name in enumerate(class_names(folder)):
        before = read
        for path in sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES):
            try:
                pixels = read_pixels(path, size)
            except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each of them for damaged files
                skipped += 1
                print(f"skipped {path}: {error}", file=sys.stderr)
                continue
            read += 1
            yield path, label, pixels
        if read - before < 2:
            raise ValueError(f"class folder {folder / name} holds {read - before} readable images; two are needed")
    if skipped:
        print(f"{skipped} files skipped, {read} images read", file=sys.stderr)


def class_names(folder: Path) -> tuple[str, ...]:
    """The sub-folders of ``folder``, sorted.

    Raises:
        ValueError: no such folder, or fewer than two classes.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    if len(names) < 2:
        raise ValueError(f"{folder} holds {len(names)} class folders; training needs at least two")
    return names


def read_pixels(path: Path, size: int) -> Tensor:
    """An image file, scaled: uint8 (3, size, size).

    Raises:
        OSError, SyntaxError, ValueError: it holds no whole image.
    """
    from PIL import Image

    with Image.open(path) as image:
        pixels = image.convert("RGB").resize((size, size)).tobytes()
    flat = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
    return flat.view(size, size, COLOURS).permute(2, 0, 1)


def deal(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train with and to hold out: shuffled within each class and dealt out in turn, held out first."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(labels[order], stable=True)]
    return order[1::2], order[0::2]
