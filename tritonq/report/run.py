"""The command that measures a model and writes the page."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from tritonq.calibration import calibrate
from tritonq.cli.data import DIGITS, load_examples, stacked
from tritonq.cli.folder import Examples
from tritonq.cli.models import add_model_arguments, load_state, read_training, recipe
from tritonq.deploy.files import atomic_file
from tritonq.report.measure import ModelMeasure, measure
from tritonq.report.page import render

# The checkpoint in the demo's output, and the one model that a checkpoint may name: a file chooses no code to run.
DEMO_FILE = "model.qat.pt"
DEMO_MODEL = "tritonq.demo.model:SmallResNet"
_CALIBRATION_BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m tritonq report``."""
    parser.epilog = (
        "Example: python -m tritonq report torchvision.models:resnet18 photos --model-arg num_classes=5 --checkpoint "
        "train-output/last.pt. With a checkpoint of `tritonq train`, qconfig, image size and factory arguments are its "
        "own. Without one the factory's model is calibrated on the training half of the images. For the demo's output: "
        "python -m tritonq report demo-output digits."
    )
    parser.add_argument("model", metavar="MODEL", help="module:factory of the float model, or the demo's output folder")
    parser.add_argument("data", metavar="DATA", help=f'a folder with one sub-folder of images per class, or "{DIGITS}"')
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="checkpoint of `tritonq train`")
    add_model_arguments(parser)
    parser.add_argument("--images", type=int, default=256, metavar="N", help="held-out images to measure; default 256")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page; default report.html"
    )


def main(arguments: argparse.Namespace) -> int:
    """Measure, write the page, and name the worst layers."""
    if arguments.images < 1:
        raise ValueError(f"at least one image is needed, got {arguments.images}")
    model, data, origin = _model(arguments)
    images, labels = stacked(data.test, _sample(len(data.test), arguments.images))
    with tqdm(desc="measuring", unit="layer", leave=False) as progress:
        measured = measure(model, images, labels, tick=progress.update)
    write(measured, data.name, origin, arguments.output)
    print(f"accuracy {measured.float_accuracy:.2%} without rounding, {measured.quantized_accuracy:.2%} with it")
    for layer in measured.layers[:3]:
        print(f"  {layer.sensitivity:8.3%} error from {layer.name} ({layer.kind}) alone")
    print(f"written: {arguments.output}")
    return 0


def write(measured: ModelMeasure, data_name: str, origin: str, path: Path) -> None:
    """Write the page; ``path`` never holds half of it."""
    with atomic_file(path) as file:
        file.write(render(measured, data_name, origin).encode())


def _model(arguments: argparse.Namespace) -> tuple[nn.Module, Examples, str]:
    """The prepared model with its ranges, the images as it reads them, and where both come from."""
    path = Path(arguments.model)
    checkpoint = arguments.checkpoint
    if path.is_dir():
        checkpoint = path / DEMO_FILE
        if not checkpoint.exists():
            raise ValueError(f"{path} is no output of the demo: it has no {DEMO_FILE}")
    if checkpoint is not None:
        made, content = read_training(checkpoint)
        named = DEMO_MODEL if path.is_dir() else arguments.model
        if made.model != named:
            raise ValueError(f"{checkpoint} was made with {made.model}, not with {named}")
        data = load_examples(arguments.data, made.size, made.channels)
        model = made.prepare()
        load_state(model, content["state_dict"], str(checkpoint))
        return model, data, f"{made.model}, trained, from {checkpoint.name}"
    data = load_examples(arguments.data, arguments.image_size, arguments.channels)
    made = recipe(arguments, data.train[0][0].shape)
    torch.manual_seed(0)
    model = made.prepare()
    chosen = _sample(len(data.train), arguments.images)
    batches = (chosen[start : start + _CALIBRATION_BATCH] for start in range(0, len(chosen), _CALIBRATION_BATCH))
    calibrate(model, (stacked(data.train, batch)[0] for batch in batches))
    return model, data, f"{made.model}, as its factory gives it, calibrated"


def _sample(count: int, wanted: int) -> list[int]:
    """Some of the images, of all classes: they are sorted by class."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted].tolist()
