"""The command ``predict``: the classes of image files, by a model in any form that `train` wrote."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tritonq.cli.folder import image_paths
from tritonq.cli.image_files import UnreadableImageError, decode
from tritonq.cli.model_files import Trained, add_trained_arguments, open_trained

_BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m tritonq predict``, and an example to its help.

    The options are those of :func:`add_trained_arguments` (model, its file and arguments, scaling of images), the
    images (files, or folders of them), ``--top`` and ``--json``.
    """
    parser.epilog = (
        "Example: python -m tritonq predict train-output/model.onnx photos/new. With a checkpoint: python -m tritonq "
        "predict torchvision.models:resnet18 photo.jpg --checkpoint train-output/model.int8.pt. Preprocessing and "
        "class names are the file's own."
    )
    add_trained_arguments(parser)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, or folders of them")
    parser.add_argument("--top", type=int, default=1, metavar="N", help="how many classes per image")
    parser.add_argument("--json", action="store_true", help="one JSON object per line, for programs")


def main(arguments: argparse.Namespace) -> int:
    """Print the most probable classes of each image; return 0 if all images could be read, else 1.

    A line is ``PATH: NAME 97.1%, NAME 2.0%``, with at most ``--top`` classes, the most probable first; a class without
    a name is given by its label. With ``--json`` it is ``{"image": PATH, "classes": [{"class": NAME, "probability":
    0.971}, ...]}``. Files that can't be read are told on stderr and skipped.

    Raises:
        ValueError: an argument that makes no sense, a path that does not exist, a folder without images, a model that
            can't be opened, or nothing says how images are scaled; the command shows the message.
        ImportError: an ONNX file without ONNX Runtime.
        OSError: a folder that can't be read.
    """
    if arguments.top < 1:
        raise ValueError(f"at least one class is shown, got --top {arguments.top}")
    paths = list(_files(arguments.images))
    trained = open_trained(arguments)
    if not trained.preprocessing.mean:
        raise ValueError("nothing says how the model's images are scaled: pass --mean and --std, or --preprocessing")
    unread = 0
    for start in range(0, len(paths), _BATCH):
        images, read = [], []
        for path in paths[start : start + _BATCH]:
            try:
                images.append(trained.preprocessing.normalised(trained.preprocessing.pixels(decode(path))))
                read.append(path)
            except UnreadableImageError as error:
                unread += 1
                print(f"tritonq predict: {path}: {error}", file=sys.stderr)
        if read:
            _print(trained, read, torch.stack(images), arguments.top, arguments.json)
    return 1 if unread else 0


def _print(trained: Trained, paths: Sequence[Path], images: torch.Tensor, top: int, as_json: bool) -> None:
    probabilities = trained.answer(images).double().softmax(1)
    shares, labels = probabilities.topk(min(top, probabilities.shape[1]), 1)
    for path, row, label_row in zip(paths, shares.tolist(), labels.tolist(), strict=True):
        named = [(trained.name_of(label), share) for label, share in zip(label_row, row, strict=True)]
        if as_json:
            found = [{"class": name, "probability": share} for name, share in named]
            print(json.dumps({"image": str(path), "classes": found}))
        else:
            print(f"{path}: {', '.join(f'{name} {share:.1%}' for name, share in named)}")


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            found = list(image_paths(path))
            if not found:
                raise ValueError(f"{path} holds no image")
            yield from found
        elif path.exists():
            yield path
        else:
            raise ValueError(f"{path} does not exist")
