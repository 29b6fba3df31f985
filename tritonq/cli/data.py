"""The images that commands train and measure with: scikit-learn's digits, or a folder with one sub-folder per class."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

DIGITS = "digits"
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
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


def load_images(source: str, size: int | None = None, channels: int | None = None) -> Images:
    """The images called ``"digits"``, or those of a folder.

    Args:
        source: ``"digits"`` or a folder with one sub-folder per class.
        size: side to scale to; None: 8 for digits, 32 for a folder.
        channels: how many the model reads; None: as they come, 1 for digits, 3 for a folder.

    Raises:
        ValueError: see :func:`load_folder`; a size below 1, or channels that can't be made.
    """
    if size is not None and size < 1:
        raise ValueError(f"images have at least one pixel, got size {size}")
    images = load_digits() if source == DIGITS else load_folder(Path(source), size or _FOLDER_SIZE)
    images = images if channels is None else images.with_channels(channels)
    return images if size is None else images.resized(size)


def load_digits() -> Images:
    """scikit-learn's 1,797 handwritten 8×8 digits: 898 to train with, 899 held out. Nothing is downloaded."""
    from sklearn.datasets import load_digits as bundled

    digits = bundled()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    return _split("scikit-learn's digits", images, labels, tuple(map(str, range(10))), seed=0)


def load_folder(folder: Path, size: int) -> Images:
    """Images in ``folder/<class>/*``, scaled to ``size`` × ``size`` RGB; every second one of a class is held out.

    Files that are no image are named on stderr, counted and skipped.

    Raises:
        ValueError: no such folder, fewer than two classes, or a class with fewer than two readable images.
    """
    from PIL import Image, UnidentifiedImageError

    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(class_folders) < 2:
        raise ValueError(f"{folder} holds {len(class_folders)} class folders; training needs at least two")
    images: list[Tensor] = []
    labels: list[int] = []
    skipped = 0
    for label, class_folder in enumerate(class_folders):
        before = len(images)
        for path in sorted(p for p in class_folder.iterdir() if p.suffix.lower() in SUFFIXES):
            try:
                with Image.open(path) as image:
                    pixels = image.convert("RGB").resize((size, size)).tobytes()
            except (UnidentifiedImageError, OSError) as error:
                skipped += 1
                print(f"skipped {path}: {error}", file=sys.stderr)
                continue
            flat = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
            images.append(flat.view(size, size, 3).permute(2, 0, 1).float())
            labels.append(label)
        if len(images) - before < 2:
            raise ValueError(
                f"class folder {class_folder} holds {len(images) - before} readable images; two are needed"
            )
    if skipped:
        print(f"{skipped} files skipped, {len(images)} images read", file=sys.stderr)
    names = tuple(path.name for path in class_folders)
    return _split(folder.name, torch.stack(images), torch.tensor(labels), names, seed=0)


def _split(name: str, images: Tensor, labels: Tensor, classes: tuple[str, ...], seed: int) -> Images:
    """Shuffle within each class and deal the images out in turn, test first."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[torch.argsort(labels[order], stable=True)]
    test, train = order[0::2], order[1::2]
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return Images(name, images[train], labels[train], images[test], labels[test], classes)
