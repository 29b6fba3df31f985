"""The command ``report``: measure a model and write the page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from tritonq.calibration import calibrate
from tritonq.cli.checkpoints import ModelRecipe, load_state, load_weights, read_training
from tritonq.cli.data import DIGITS, Examples, add_data_arguments, class_names, open_examples, stacked
from tritonq.cli.models import add_model_arguments, add_qconfig_argument, find_qconfig, make_model, prepare
from tritonq.cli.paths import writable_file
from tritonq.cli.preprocessing import add_preprocessing_arguments, choose_preprocessing
from tritonq.deploy.files import atomic_file
from tritonq.qconfig_files import mapping_to_data
from tritonq.report.measure import ModelMeasure, measure
from tritonq.report.page import render

# The checkpoint in the demo's output, and the one model that a checkpoint may name: a file chooses no code to run.
DEMO_FILE = "model.qat.pt"
DEMO_MODEL = "tritonq.demo.model:SmallResNet"
_CALIBRATION_BATCH = 64
_CLASSES_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m tritonq report``: MODEL, DATA, ``--checkpoint`` or ``--weights``, and others.

    These are ``--validation``, those about models, qconfigs and preprocessing, ``--images`` and ``--output``.
    """
    parser.epilog = (
        "Example: python -m tritonq report torchvision.models:resnet18 photos --model-arg num_classes=5 --checkpoint "
        "train-output/best.pt. With a checkpoint of `tritonq train`, qconfig, preprocessing and factory arguments are "
        "its own. Without one the factory's model, with --weights if given, is calibrated on the training images. For "
        "the demo's output: python -m tritonq report demo-output digits."
    )
    parser.add_argument("model", metavar="MODEL", help="module:factory of the float model, or the demo's output folder")
    add_data_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="checkpoint of `tritonq train`")
    source.add_argument("--weights", type=Path, metavar="FILE", help="state dict of the float model, to be calibrated")
    add_model_arguments(parser)
    add_qconfig_argument(parser)
    add_preprocessing_arguments(parser)
    parser.add_argument("--images", type=int, default=256, metavar="N", help="held-out images to measure")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page")


def main(arguments: argparse.Namespace) -> int:
    """Measure the model, write the page to ``--output``, print accuracies and the three worst layers; return 0.

    Raises:
        ValueError: ``--images`` below one, an ``--output`` that is a folder or whose folder does not exist, a MODEL
            that is a folder without the demo's checkpoint, or one with ``--checkpoint`` or ``--weights``, a checkpoint
            of another model or of other classes, or a file or folder of images that can't be read.
        OSError: nothing can be written to the folder of ``--output``.
    """
    if arguments.images < 1:
        raise ValueError(f"at least one image is needed, got {arguments.images}")
    writable_file(arguments.output)
    model, data, origin = _model(arguments)
    images, labels = stacked(data.test, _sample(len(data.test), arguments.images))
    with tqdm(desc="measuring", unit="layer", leave=False, disable=None) as progress:

        def tick(done: int, total: int) -> None:
            progress.total = total
            progress.update(done - progress.n)

        measured = measure(model, images, labels, tick=tick)
    write(measured, data.name, origin, arguments.output)
    print(f"accuracy {measured.float_accuracy:.2%} without rounding, {measured.quantized_accuracy:.2%} with it")
    for layer in measured.layers[:3]:
        print(f"  {layer.sensitivity:8.3%} error from {layer.name} ({layer.kind}) alone")
    print(f"written: {arguments.output}")
    return 0


def write(measured: ModelMeasure, data_name: str, origin: str, path: Path) -> None:
    """Write the page to ``path``, as a whole file or not at all.

    Args:
        measured: what :func:`~tritonq.report.measure.measure` found.
        data_name: where the images come from, such as ``"scikit-learn's digits"``.
        origin: what the model is and where its ranges come from, for the line below the title.
        path: the HTML file; one that exists is replaced.

    Raises:
        OSError: the file can't be written, or its folder is missing.
    """
    with atomic_file(path) as file:
        file.write(render(measured, data_name, origin).encode())


def _model(arguments: argparse.Namespace) -> tuple[nn.Module, Examples, str]:
    """Return the prepared model with its ranges, the images, and in words where model and ranges come from."""
    path = Path(arguments.model)
    checkpoint = arguments.checkpoint
    if path.is_dir():
        if checkpoint is not None or arguments.weights is not None:
            raise ValueError(f"{path} is an output of the demo, with a checkpoint of its own: leave the other out")
        checkpoint = path / DEMO_FILE
        if not checkpoint.exists():
            raise ValueError(f"{path} is no output of the demo: it has no {DEMO_FILE}")
    if checkpoint is not None:
        made, content = read_training(checkpoint)
        named = DEMO_MODEL if path.is_dir() else arguments.model
        if made.model != named:
            raise ValueError(f"{checkpoint} was made with {made.model}, not with {named}")
        model = prepare(made)
        load_state(model, content["state_dict"], str(checkpoint))
        data = open_examples(arguments.data, made.preprocessing, arguments.validation)
        if made.classes and data.classes != made.classes:
            raise ValueError(f"{checkpoint} knows the classes {_listed(made.classes)}, not {_listed(data.classes)}")
        return model, data, f"{made.model}, trained, from {checkpoint.name}"
    torch.manual_seed(0)
    model = make_model(arguments.model, arguments.model_arg)
    if arguments.weights is not None:
        load_weights(model, arguments.weights)
    qconfig = mapping_to_data(find_qconfig(arguments.qconfig))
    preprocessing = choose_preprocessing(arguments, model, arguments.data == DIGITS)
    classes = class_names(arguments.data, arguments.validation)
    model = prepare(ModelRecipe(arguments.model, tuple(arguments.model_arg), qconfig, preprocessing, classes), model)
    data = open_examples(arguments.data, preprocessing, arguments.validation)
    chosen = _sample(len(data.train), arguments.images)
    batches = (chosen[start : start + _CALIBRATION_BATCH] for start in range(0, len(chosen), _CALIBRATION_BATCH))
    calibrate(model, (stacked(data.train, batch)[0] for batch in batches))
    origin = "as its factory gives it" if arguments.weights is None else f"with {arguments.weights.name}"
    return model, data, f"{arguments.model}, {origin}, calibrated"


def _listed(classes: Sequence[str]) -> str:
    shown = ", ".join(classes[:_CLASSES_SHOWN])
    return f"{shown} …" if len(classes) > _CLASSES_SHOWN else shown


def _sample(count: int, wanted: int) -> list[int]:
    """Return ``wanted`` of the indices below ``count``, in a random order that is always the same.

    Images are sorted by class, so that the first ones would be of one class.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted].tolist()
