"""A folder of images with one sub-folder per class, read file by file."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from tritonq.cli.augment import Augmentation
from tritonq.cli.image_files import SUFFIXES, UnreadableImageError, decode
from tritonq.cli.messages import reason_of
from tritonq.cli.preprocessing import Preprocessing

_TRAIN = "train"
# In this order: the first that is there is used.
_VALIDATION = ("val", "valid", "validation", "test")
_FILES_AT_A_TIME = 256


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Base class of data sets of images, float32 (channels, height, width) as a model reads them, each with its label.

    Subclasses define ``__len__``, and ``__getitem__``, which returns ``(image, label)``, the label an int from 0.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    def augmented(self, augmentation: Augmentation, seed: int) -> LabelledImages:
        """Return a data set of the same images with random changes, which follow from ``seed`` and each image's index.

        Subclasses whose images can be changed override it. This one returns the data set itself if ``augmentation`` is
        empty, and else raises an error.

        Args:
            augmentation: names the changes, such as "flip" and "crop", in the order in which they are made.
            seed: where random numbers start; the caller passes another one in each epoch.

        Raises:
            ValueError: the class can't change its images, and ``augmentation`` is not empty.
        """
        if augmentation:
            raise ValueError(f"{type(self).__name__} can't be augmented: --augment is for folders of images")
        return self


class FileImages(LabelledImages):
    """Images that are read from their files each time.

    Attributes:
        paths: the files.
        labels: for each file the index of its class.
        preprocessing: how they are scaled and cropped; its mean and deviation must not be empty.
        augmentation: random changes that are made as an image is read; None: none.
        seed: of the changes; the same seed changes the image at an index in the same way each time.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.paths, self.labels, self.preprocessing = paths, labels, preprocessing
        self.augmentation, self.seed = augmentation, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Read the image at ``index``; return it, float32 (channels, height, width), with its label.

        Raises:
            UnreadableImageError: the file was readable when the folder was opened, and is no longer.
        """
        path = self.paths[index]
        try:
            image = decode(path)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{path} can't be read any more: {error}") from error
        if self.augmentation:
            pixels = self.augmentation.pixels(image, self.preprocessing, (self.seed, index))
        else:
            pixels = self.preprocessing.pixels(image)
        return self.preprocessing.normalised(pixels), self.labels[index]

    def augmented(self, augmentation: Augmentation, seed: int) -> FileImages:
        """Return a new data set of the same files, whose images are changed by ``augmentation`` as they are read.

        It replaces the changes of this data set. Random numbers follow from ``seed`` and the index of the image.
        """
        return FileImages(self.paths, self.labels, self.preprocessing, augmentation, seed)


@dataclass(frozen=True)
class ImageFile:
    """One readable image of a folder.

    Attributes:
        path: the file.
        label: index of its class in the names that `readable_images` was given.
        digest: SHA-256 of its bytes, as hexadecimal text.
        count: how many values it has after scaling and cropping, pixels times channels.
        total: the sum of these values, each from 0 to 255.
        squares: the sum of their squares.
    """

    path: Path
    label: int
    digest: str
    count: int
    total: int
    squares: int


@dataclass(frozen=True)
class FolderLayout:
    """Where a data set's images are.

    Attributes:
        train: folder with one sub-folder per class, of images to train with.
        validation: another such folder, of images that are held out, which may lack some of the classes; None: images
            are to be held out from ``train``.
        classes: names of the sub-folders of ``train``, sorted; a label is an index of them.
    """

    train: Path
    validation: Path | None
    classes: tuple[str, ...]


def find_layout(folder: Path, validation: Path | None = None, least: int = 2) -> FolderLayout:
    """Return where the images are: in sub-folders of ``folder``, or of its ``train`` and ``val``. No image is read.

    Of ``val``, ``valid``, ``validation`` and ``test`` the first that is there is taken for ``val``. The others of these
    four are ignored, such as a ``test`` beside ``val``. ``train`` is a class if none of the four is beside it, or if it
    has no sub-folders and folders of other names are beside it.

    Args:
        folder: holds one sub-folder per class, or ``train`` and ``val`` that do. Hidden folders are no classes.
        validation: another folder with one sub-folder per class, used instead of ``val``; None: ``val`` if there is
            one, else none (the caller then holds images out from training).
        least: how many classes there must be.

    Raises:
        ValueError: no such folder, folders of other names beside these four and a ``train`` that is no class, fewer
            classes, a class without image files, or a validation folder without images or with classes that training
            has not.
        OSError: a folder can't be read.
    """
    names = _folders(folder)
    held_out = [name for name in _VALIDATION if name in names]
    others = sorted(set(names) - {_TRAIN, *_VALIDATION})
    # A folder of that name without folders is a class among others.
    if _TRAIN in names and held_out and (not others or _folders(folder / _TRAIN)):
        if others:
            parts = f"{folder / _TRAIN}, and --validation {folder / held_out[0]}"
            raise ValueError(f"{folder} holds {_TRAIN}, {held_out[0]}, and {others[0]!r} beside them: name {parts}")
        if validation is None:
            validation = folder / held_out[0]
        folder = folder / _TRAIN
        names = _folders(folder)
    if len(names) < least:
        expected = "folders of at least two classes" if least > 1 else "a folder for each class"
        raise ValueError(f"expected {expected}, {folder} holds {', '.join(names) or 'none'}")
    if validation is not None and (foreign := sorted(set(_folders(validation)) - set(names))):
        raise ValueError(f"{validation} has a class {foreign[0]!r} that {folder} has not")
    if validation is not None and all(next(image_paths(validation / name), None) is None for name in names):
        raise ValueError(f"{validation} holds no images in a folder per class, such as {validation / names[0]}")
    for name in names:
        if next(image_paths(folder / name), None) is None:
            raise ValueError(
                f"class folder {folder / name} holds no images, such as .png or .jpg; a folder that is no class lies "
                "elsewhere, or its name begins with a dot"
            )
    return FolderLayout(folder, validation, names)


def readable_images(
    folder: Path,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    workers: int = 0,
    least: int = 2,
    *,
    quiet: bool = False,
) -> list[ImageFile]:
    """Read every image in ``folder/<class>/``, at any depth; return an `ImageFile` for each that can be read.

    They come class by class, within each sorted by path; pixels are not kept. Files with an image's ending that can't
    be read are skipped; stderr names and counts them.

    Args:
        folder: the folder.
        classes: names of its sub-folders; a file's label is the index of its class. One that is missing has no images.
        preprocessing: scales and crops an image before its values are summed up (``total``, ``squares``).
        workers: threads that read; 0: one per processor.
        least: how many images a class must have.
        quiet: print nothing, because another process prints the same.

    Raises:
        ValueError: a class with fewer readable images.
        OSError: a folder that can't be read.
    """
    paths = [(path, label) for label, name in enumerate(classes) for path in image_paths(folder / name)]
    found: list[ImageFile] = []
    skipped = 0

    def look(item: tuple[Path, int]) -> ImageFile | str:
        return _look(*item, preprocessing)

    bar = tqdm(
        total=len(paths), desc=f"reading {folder.resolve().name}", unit="image", leave=False, disable=quiet or None
    )
    with ThreadPoolExecutor(workers or os.cpu_count()) as readers, bar:
        for start in range(0, len(paths), _FILES_AT_A_TIME):
            for outcome in readers.map(look, paths[start : start + _FILES_AT_A_TIME]):
                bar.update()
                if isinstance(outcome, ImageFile):
                    found.append(outcome)
                else:
                    skipped += 1
                    if not quiet:
                        bar.write(outcome, file=sys.stderr)
    counts = [0] * len(classes)
    for file in found:
        counts[file.label] += 1
    for name, count in zip(classes, counts, strict=True):
        if count < least:
            raise ValueError(f"class folder {folder / name} holds {count} readable images; {least} are needed")
    if skipped and not quiet:
        print(f"{skipped} of {len(paths)} files skipped", file=sys.stderr)
    return found


def moments(files: Sequence[ImageFile]) -> tuple[float, float]:
    """Return mean and standard deviation, both divided by 255, of the values of all files, channels taken together.

    The variance is that over n - 1 values; the deviation is above 0 also where all values are the same. There must be
    at least one file.
    """
    count = sum(file.count for file in files)
    mean = sum(file.total for file in files) / count
    variance = (sum(file.squares for file in files) / count - mean**2) * count / max(count - 1, 1)
    return mean / 255, max(variance, 1e-12) ** 0.5 / 255


def deal(labels: Tensor, seed: int, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return indices of ``labels`` to train with, and those to hold out: int64, sorted by class, shuffled within each.

    Args:
        labels: the label of each image, int64 (n,), on the CPU.
        seed: of the order; the same gives the same indices.
        share: the fraction, from 0 to 1, of each class that is held out: rounded up or down to whole images, so that
            the number of all that are held out is ``share`` of n, rounded up.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(labels[order], stable=True)]
    # Rounded, since 3 · 0.1 is not 0.3.
    dealt = [math.ceil(round(position * share, 9)) for position in range(len(labels) + 1)]
    held_out = torch.tensor([after > before for before, after in pairwise(dealt)], dtype=torch.bool)
    return order[~held_out], order[held_out]


def _look(path: Path, label: int, preprocessing: Preprocessing) -> ImageFile | str:
    """Read an image file and return its label, hash and sums over pixels; if it can't be read, a line that says why."""
    try:
        content = path.read_bytes()
        pixels = preprocessing.pixels(decode(path, content)).long()
    except (OSError, UnreadableImageError) as error:
        return f"skipped {path}: {reason_of(error)}"
    digest = hashlib.sha256(content).hexdigest()
    return ImageFile(path, label, digest, pixels.numel(), int(pixels.sum()), int(pixels.square().sum()))


def _folders(folder: Path) -> tuple[str, ...]:
    """Return the names of the sub-folders of ``folder``, sorted, without hidden ones such as ``.ipynb_checkpoints``."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def image_paths(folder: Path) -> Iterator[Path]:
    """Yield the files in ``folder`` and below it with an image's ending, such as ``.png`` or ``.JPG``, sorted by path.

    Files and sub-folders whose names begin with a dot are left out, the latter with all that they hold. If ``folder``
    is missing or no folder, nothing is yielded. Links are followed, except those to a folder that they lie in.

    Raises:
        OSError: a folder that can't be read.
    """
    if folder.is_dir():
        yield from sorted(
            path for path in _files(folder, frozenset(folder.resolve().parents)) if path.suffix.lower() in SUFFIXES
        )


def _files(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Yield the files below ``folder``; ``above`` are the folders in which it lies."""
    within = above | {folder.resolve()}
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                yield path
            elif path.resolve() not in within:
                yield from _files(path, within)
