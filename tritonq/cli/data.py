"""The images that commands train and measure with: scikit-learn's digits, or a folder with one sub-folder per class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.cli.folder import COLOURS, Examples, LabelledImages, deal, open_folder

DIGITS = "digits"
_FOLDER_SIZE = 32


@dataclass(frozen=True)
class Images:
    """Images split into training and test set, normalised to mean 0 and deviation 1 by the training set.

    Attributes:
        name: where they come from.
        train_images: float32 (n, channels, height, width).
        train_labels: int64 (n,).
        test_images: as ``train_images``.
        test_labels: as ``train_labels``.
        classes: class names by label.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def with_channels(self, channels: int) -> Images:
        """Grey images with their one channel repeated, as models of colour images read them.

        Raises:
            ValueError: colour images, which are no grey ones.
        """
        have = self.train_images.shape[1]
        if have == channels:
            return self
        if have != 1:
            raise ValueError(f"{self.name} has {have} channels, which are not {channels}")
        widened = (images.expand(-1, channels, -1, -1).contiguous() for images in (self.train_images, self.test_images))
        train, test = widened
        return replace(self, train_images=train, test_images=test)

    def resized(self, size: int) -> Images:
        """The images scaled to ``size`` × ``size``, bilinearly."""
        if self.train_images.shape[-2:] == (size, size):
            return self
        train, test = (
            F.interpolate(images, (size, size), mode="bilinear") for images in (self.train_images, self.test_images)
        )
        return replace(self, train_images=train, test_images=test)


class TensorImages(LabelledImages):
    """Images that are held in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image and its label."""
        return self.images[index], int(self.labels[index])


def load_examples(source: str, size: int | None = None, channels: int | None = None) -> Examples:
    """The images called ``"digits"``, or those of a folder, whose pixels are read when they are asked for.

    Args:
        source: ``"digits"`` or a folder with one sub-folder per class.
        size: side to scale to; None: 8 for digits, 32 for a folder.
        channels: how many the model reads; None: as they come, 1 for digits, 3 for a folder.

    Raises:
        ValueError: see :func:`tritonq.cli.folder.open_folder`; a size below 1, or channels that can't be made.
    """
    if size is not None and size < 1:
        raise ValueError(f"images have at least one pixel, got size {size}")
    if source == DIGITS:
        digits = load_digits()
        digits = digits if channels is None else digits.with_channels(channels)
        digits = digits if size is None else digits.resized(size)
        train = TensorImages(digits.train_images, digits.train_labels)
        return Examples(digits.name, digits.classes, train, TensorImages(digits.test_images, digits.test_labels))
    examples = open_folder(Path(source), size or _FOLDER_SIZE)
    if channels not in (None, COLOURS):
        raise ValueError(f"{examples.name} has {COLOURS} channels, which are not {channels}")
    return examples


def stacked(images: LabelledImages, chosen: Iterable[int] | None = None) -> tuple[Tensor, Tensor]:
    """Images float32 (n, channels, height, width) and their labels int64 (n,): those chosen, or all."""
    read = [images[index] for index in (range(len(images)) if chosen is None else chosen)]
    return torch.stack([image for image, _ in read]), torch.tensor([label for _, label in read])


def load_digits() -> Images:
    """scikit-learn's 1,797 handwritten 8×8 digits: 898 to train with, 899 held out. Nothing is downloaded."""
    from sklearn.datasets import load_digits as bundled

    digits = bundled()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = deal(labels, seed=0)
    images = (images - images[train].mean()) / images[train].std()
    classes = tuple(map(str, range(10)))
    return Images("scikit-learn's digits", images[train], labels[train], images[test], labels[test], classes)


def load_folder(folder: Path, size: int) -> Images:
    """All images in ``folder/<class>/*`` at once, scaled to ``size`` × ``size`` RGB; every second one is held out.

    Raises:
        ValueError: see :func:`tritonq.cli.folder.readable_images`.
    """
    lazy = open_folder(folder, size)
    return Images(lazy.name, *stacked(lazy.train), *stacked(lazy.test), lazy.classes)
