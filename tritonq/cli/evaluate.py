"""The command ``evaluate``: the accuracy of a model in any form that `train` wrote."""

from __future__ import annotations

import argparse
from itertools import chain

import torch
from tqdm import tqdm

from tritonq.cli.classification import in_order
from tritonq.cli.data import Examples, add_data_arguments, class_names, open_examples
from tritonq.cli.model_files import Trained, add_trained_arguments, open_trained

_PARTS = ("held-out", "train", "all")
_CLASSES_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m tritonq evaluate``: model and file, images, ``--part`` of these, ``--workers``.

    An example becomes the parser's epilog.
    """
    parser.epilog = (
        "Example: python -m tritonq evaluate train-output/model.onnx photos. The images that `train` held out are held "
        "out here too, if DATA and --validation are the same; --part all takes every image of a folder of its own."
    )
    add_trained_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--part", choices=_PARTS, default="held-out", help="which of the images")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images ahead")


def main(arguments: argparse.Namespace) -> int:
    """Print the accuracy of all classes together, then of the 20 worst classes, worst first; return the exit status 0.

    The first line is ``TITLE: 91.20% of 500 images right``, with the model's title; that of a class is ``60.00% of 20
    images of NAME``. Classes without images are left out. If there are more than 20, a last line counts the others.

    Raises:
        ValueError: a model or images that can't be opened, or a class that the model does not know.
        ImportError: an ONNX file without ONNX Runtime.
        OSError: a folder of images that can't be read.
    """
    trains = arguments.part != "all"
    names = class_names(arguments.data, arguments.validation, trains=trains)
    trained = open_trained(arguments, arguments.data)
    labels = _labels(trained, names)
    data = open_examples(arguments.data, trained.preprocessing, arguments.validation, arguments.workers, trains=trains)
    right, count = _score(trained, data, labels, arguments.part, arguments.workers)
    total = int(count.sum())
    print(f"{trained.title}: {int(right.sum()) / total:.2%} of {total} images right")
    shown = [(name, int(right[k]), int(count[k])) for k, name in enumerate(names) if count[k]]
    for name, hits, images in sorted(shown, key=lambda row: row[1] / row[2])[:_CLASSES_SHOWN]:
        print(f"  {hits / images:7.2%} of {images} images of {name}")
    if len(shown) > _CLASSES_SHOWN:
        print(f"  and {len(shown) - _CLASSES_SHOWN} classes that do better")
    return 0


def _labels(trained: Trained, names: tuple[str, ...]) -> torch.Tensor:
    """Return, for each class of the data, the label that the model gives it: int64 (classes,).

    It is found by the class's name if the model knows names. Otherwise both count classes alike.

    Raises:
        ValueError: a class that the model does not know.
    """
    if not trained.classes:
        return torch.arange(len(names))
    foreign = [name for name in names if name not in trained.classes]
    if foreign:
        raise ValueError(f"the model knows no class {foreign[0]!r}; it knows {', '.join(trained.classes[:10])}")
    return torch.tensor([trained.classes.index(name) for name in names])


def _score(
    trained: Trained, data: Examples, labels: torch.Tensor, part: str, workers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each class how many images are classified correctly, and how many there are: two int64 (classes,).

    Args:
        trained: the model.
        data: its images.
        labels: for each class of the data the label that the model gives it.
        part: ``"held-out"``, ``"train"`` or ``"all"``: which of the images.
        workers: processes that read images; 0: this one.
    """
    parts = {"held-out": [data.test], "train": [data.train], "all": [data.train, data.test]}[part]
    right, count = (torch.zeros(len(labels), dtype=torch.int64) for _ in range(2))
    batches = chain.from_iterable(in_order(images, workers) for images in parts)
    for batch, wanted in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=None):
        hits = trained.answer(batch).argmax(1) == labels[wanted]
        count += torch.bincount(wanted, minlength=len(labels))
        right += torch.bincount(wanted[hits], minlength=len(labels))
    return right, count
