"""The images with which commands train and measure.

They are scikit-learn's digits, or those of a folder with one sub-folder per class.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.cli.folder import FileImages, ImageFile, LabelledImages, deal, find_layout, moments, readable_images
from tritonq.cli.preprocessing import Preprocessing

DIGITS = "digits"
_DIGITS_NAME = "scikit-learn's digits"
# Digits have 17 grey levels, 0 to 16.
_DARKEST_DIGIT = 16
_CLASSES_OF_DIGITS = tuple(map(str, range(10)))


@dataclass(frozen=True)
class Examples:
    """The images with which a model is trained and measured; they may be read from files when they are asked for.

    Attributes:
        name: where they come from: ``"scikit-learn's digits"``, or the folder's name without its parents.
        classes: class names; the index is the label.
        preprocessing: how they are scaled, mean and deviation included.
        train: images to train with.
        test: images held out.
        fingerprint: SHA-256, as hexadecimal digits, of class names and of the bytes, labels and order of the files in
            ``train`` and ``test``, wherever they lie; of the digits a text: ``"scikit-learn's digits, 899 held out"``.
    """

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: LabelledImages
    test: LabelledImages
    fingerprint: str


class TensorImages(LabelledImages):
    """Images that are held in memory.

    Attributes:
        images: float32 (n, channels, height, width), as the model reads them: ``(x - mean) / std``, x from 0 to 1.
        labels: int64 (n,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the image at ``index``, float32 (channels, height, width), and its label."""
        return self.images[index], int(self.labels[index])


@dataclass(frozen=True)
class Images:
    """The images of :class:`Examples`, all of them in memory.

    Attributes:
        name: as that of :class:`Examples`.
        classes: class names; the index is the label.
        preprocessing: how they were scaled, mean and deviation included.
        train_images: float32 (n, channels, height, width), as the model reads them.
        train_labels: int64 (n,).
        test_images: as ``train_images``.
        test_labels: as ``train_labels``.
    """

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``DATA``, which names the images, and ``--validation``: a folder of those held out, or a share.

    The parser returns them as ``data`` and ``validation``: texts, which are not checked here. The share is that of DATA
    which is held out; by default it is "0.5".
    """
    parser.add_argument("data", metavar="DATA", help=_DATA_HELP)
    parser.add_argument(
        "--validation",
        metavar="DIR|FRACTION",
        default="0.5",
        help="folder of the images held out, or the share of DATA that is; ignored for DATA with train and val in it",
    )


def add_data_option(parser: argparse.ArgumentParser, name: str, purpose: str) -> None:
    """Add the option ``name``, which names images, to a command that needs them only in some uses.

    It takes a text, which is not checked here: ``"digits"``, or a folder of images by class. Without the option the
    parser returns None for it. The option's help begins with ``purpose``.
    """
    parser.add_argument(name, metavar="DATA", help=f"{purpose}: {_DATA_HELP}")


_DATA_HELP = (
    f'a folder with one sub-folder of images per class, or with train and val that have such, or "{DIGITS}"; '
    "hidden folders are left out"
)


def class_names(source: str, validation: str = "0.5", *, trains: bool = True) -> tuple[str, ...]:
    """Return the names of the classes of a data set, the label as the index; no image is read.

    Args:
        source: ``"digits"`` (classes ``"0"`` to ``"9"``), or a folder with one sub-folder per class, whose sorted names
            are the classes, or a folder with two such folders: ``train``, and ``val``, ``valid``, ``validation`` or
            ``test``, of which the first that is there counts, called ``val`` below.
        validation: a folder of the same classes, used instead of ``val``, or the share that is held out, above 0 and
            below 1; a share does not change the names.
        trains: whether a model is trained with the images, for which there must be two classes; else one is enough.

    Raises:
        ValueError: no such folder, too few classes, a class without image files, validation classes that training has
            not, a validation folder for the digits or without images, other folders beside ``train`` and ``val``, or a
            share that is not above 0 and below 1.
        OSError: a folder can't be read.
    """
    folder, _ = _validation(validation, source)
    return _CLASSES_OF_DIGITS if source == DIGITS else find_layout(Path(source), folder, _least(trains)).classes


def open_examples(
    source: str,
    preprocessing: Preprocessing,
    validation: str = "0.5",
    workers: int = 0,
    *,
    quiet: bool = False,
    trains: bool = True,
) -> Examples:
    """Return scikit-learn's digits, or the images of a folder, whose pixels are read when they are asked for.

    Each file is read once here, for its checksum, and for mean and deviation. Those that can't be read are left out and
    named on stderr.

    Args:
        source: ``"digits"`` or a folder, as :func:`class_names` takes it.
        preprocessing: how they are scaled; without a mean it takes the training images' own mean and deviation.
        validation: a folder of the same classes, or the share that is held out, above 0 and below 1. A share is ignored
            if the source has ``train`` and ``val``; a folder is used instead of ``val``.
        workers: threads that read files here; 0: one per processor.
        quiet: print neither progress nor the files left out, because another process does.
        trains: whether a model is trained with the images, for which there must be two classes, an image of each to
            train with, and one held out in all. Otherwise one class with one image is enough.

    Raises:
        ValueError: no such folder, too few classes, a class with too few readable images, none held out, validation
            classes that training has not, a validation folder for the digits or without images, other folders beside
            ``train`` and ``val``, a share that is not above 0 and below 1, or less than no workers.
        OSError: a folder can't be read.
        ImportError: scikit-learn, which has the digits, or Pillow, which reads files, is not installed.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    folder, share = _validation(validation, source)
    if source == DIGITS:
        return _digits(preprocessing, share)
    layout = find_layout(Path(source), folder, _least(trains))
    least = _least(trains and layout.validation is None)
    files = readable_images(layout.train, layout.classes, preprocessing, workers, least, quiet=quiet)
    if layout.validation is None:
        train, test = (
            [files[index] for index in part.tolist()]
            for part in deal(torch.tensor([file.label for file in files]), seed=0, share=share)
        )
    else:
        train = files
        test = readable_images(layout.validation, layout.classes, preprocessing, workers, 0, quiet=quiet)
    if trains:
        _check_parts(layout.classes, *([file.label for file in part] for part in (train, test)))
    preprocessing = preprocessing.with_moments(*moments(train or test))
    trained, held_out = (
        FileImages([file.path for file in part], [file.label for file in part], preprocessing) for part in (train, test)
    )
    fingerprint = _fingerprint(layout.classes, train, test)
    return Examples(Path(source).resolve().name, layout.classes, preprocessing, trained, held_out, fingerprint)


def load_digits(preprocessing: Preprocessing | None = None) -> Images:
    """Return scikit-learn's 1,797 handwritten 8×8 digits: 898 to train with, 899 held out. Nothing is downloaded.

    Grey levels are divided by 16, to x from 0 to 1, and become ``(x - mean) / std``. Mean, std, size and channels are
    those of ``preprocessing``; None: 8×8 pixels in one channel. Another size is reached by bilinear interpolation:
    crop, ``resize`` and interpolation in it are not used. Without a mean, mean and std are the training images' own.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    return in_memory(_digits(Preprocessing(8, 8, channels=1) if preprocessing is None else preprocessing, 0.5))


def in_memory(examples: Examples) -> Images:
    """Return ``examples`` with all images in memory; there must be at least one to train with and one held out.

    Raises:
        UnreadableImageError: a file can't be read any more.
    """
    parts = (*stacked(examples.train), *stacked(examples.test))
    return Images(examples.name, examples.classes, examples.preprocessing, *parts)


def stacked(images: LabelledImages, chosen: Iterable[int] | None = None) -> tuple[Tensor, Tensor]:
    """Return copies of the images with the ``chosen`` indices (None: all) in that order, and their labels.

    They are float32 (n, channels, height, width), and int64 (n,); there must be at least one.

    Raises:
        UnreadableImageError: a file can't be read any more.
    """
    read = [images[index] for index in (range(len(images)) if chosen is None else chosen)]
    return torch.stack([image for image, _ in read]), torch.tensor([label for _, label in read])


def _digits(preprocessing: Preprocessing, share: float) -> Examples:
    from sklearn.datasets import load_digits as bundled

    digits = bundled()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / _DARKEST_DIGIT
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = deal(labels, 0, share)
    _check_parts(_CLASSES_OF_DIGITS, labels[train].tolist(), labels[test].tolist())
    preprocessing = preprocessing.with_moments(float(images[train].mean()), float(images[train].std()))
    images = preprocessing.normalised(images.expand(-1, preprocessing.channels, -1, -1))
    if images.shape[-1] != preprocessing.size:
        images = F.interpolate(images, (preprocessing.size, preprocessing.size), mode="bilinear")
    fingerprint = f"{_DIGITS_NAME}, {len(test)} held out"
    trained, held_out = (TensorImages(images[part].contiguous(), labels[part]) for part in (train, test))
    return Examples(_DIGITS_NAME, _CLASSES_OF_DIGITS, preprocessing, trained, held_out, fingerprint)


def _validation(text: str, source: str) -> tuple[Path | None, float]:
    """Return the folder of images held out, or the share of ``source`` that is, from what the user said.

    Raises:
        ValueError: a share outside of 0 to 1, or a folder beside the digits.
    """
    try:
        share = float(text)
    except ValueError:
        if source == DIGITS:
            raise ValueError(f"of the digits a share is held out, such as --validation 0.5, got {text!r}") from None
        return Path(text), 0.0
    if not 0 < share < 1:
        raise ValueError(f"the share of images that is held out lies between 0 and 1, got {text}")
    return None, share


def _least(both_parts: bool) -> int:
    """Return how many there must be at least: two, so that there is one for each part, or one."""
    return 2 if both_parts else 1


def _check_parts(classes: Sequence[str], train: Sequence[int], test: Sequence[int]) -> None:
    """Raise ValueError if a class has no label in ``train``, or ``test`` no label at all."""
    have = set(train)
    without = [name for label, name in enumerate(classes) if label not in have]
    if without:
        raise ValueError(f"no image of class {without[0]!r} is left to train with: hold fewer out with --validation")
    if not test:
        raise ValueError("no image is held out: there is nothing to measure accuracy with")


def _fingerprint(classes: Sequence[str], *parts: Sequence[ImageFile]) -> str:
    digest = hashlib.sha256("\n".join(classes).encode(errors="surrogateescape"))  # names of folders may be no text
    for part in parts:
        digest.update(b"\n\n")
        digest.update("\n".join(f"{file.label} {file.digest}" for file in part).encode())
    return digest.hexdigest()
