"""The command ``export``: write a checkpoint as ONNX, as int8 for tritonq, or as a program for torch.export."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from tritonq.calibration import calibrate
from tritonq.cli.checkpoints import ModelRecipe, has_format
from tritonq.cli.data import add_data_option, open_examples, stacked
from tritonq.cli.deployment import metadata, write_onnx
from tritonq.cli.model_files import ONNX_SUFFIX, PROGRAM_SUFFIX, Trained, add_trained_arguments, open_trained
from tritonq.cli.models import add_qconfig_argument, find_qconfig, prepare
from tritonq.cli.paths import writable_file
from tritonq.deploy import convert, export_program, save_converted
from tritonq.deploy.converted_file import FORMAT as CONVERTED
from tritonq.qconfig_files import mapping_to_data
from tritonq.targets import ONNX_FORMS

_INT8_SUFFIX = ".pt"
_SUFFIXES = (ONNX_SUFFIX, _INT8_SUFFIX, PROGRAM_SUFFIX)
_CALIBRATION_BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m tritonq export``: model, output file, qconfig, target, images to calibrate with.

    An example becomes the parser's epilog.
    """
    parser.epilog = (
        "Example: python -m tritonq export torchvision.models:resnet18 model.onnx --checkpoint train-output/best.pt "
        "--target tensorrt. The ending says the format: .onnx, .pt (int8, for tritonq.load_converted), .pt2 (for "
        "torch.export.load). A float model is calibrated first: --checkpoint float.pt --calibrate photos."
    )
    add_trained_arguments(parser, onnx=False)
    parser.add_argument("output", type=Path, metavar="FILE", help=f"file to write, ending in {', '.join(_SUFFIXES)}")
    add_qconfig_argument(parser, "for --calibrate: ")
    parser.add_argument(
        "--target", choices=ONNX_FORMS, help="whose ONNX file it is, by default that of the preset's target"
    )
    add_data_option(parser, "--calibrate", "images to calibrate a float model with")
    parser.add_argument("--images", type=int, default=256, metavar="N", help="how many to calibrate with")


def main(arguments: argparse.Namespace) -> int:
    """Write the file and print its path and size; return the exit status 0.

    The file's ending says the format: ``.onnx``, ``.pt`` (as ``save_converted``) or ``.pt2`` (as ``export_program``).
    A float model needs ``--calibrate``: it is prepared by ``--qconfig``, and calibrated on up to ``--images`` of those
    of ``--calibrate`` that are for training, drawn with a fixed seed. Any other model refuses ``--calibrate``.

    Raises:
        ValueError: an argument that makes no sense, such as an ONNX file as model or a ``.pt`` file to write that
            exists and is no converted file, or a model that can't be exported; the command shows the message.
        OSError: the file can't be written, or a folder of images not read.
        ImportError: a package that reading or writing ONNX needs is not installed.
        RuntimeError: with rounding off the prepared model would not compute what the float model does.
    """
    path = arguments.output
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path} ends in none of {', '.join(_SUFFIXES)}, which say the format")
    if arguments.images < 1:
        raise ValueError(f"at least one image is needed, got {arguments.images}")
    writable_file(path)
    if path.suffix == _INT8_SUFFIX and path.exists() and not has_format(path, CONVERTED):
        raise ValueError(f"{path} exists and is no converted model, such as a checkpoint: name another file")
    trained = open_trained(arguments, arguments.calibrate)
    if trained.form == "onnx" or trained.model is None:
        raise ValueError("an ONNX file can't be exported again: export the checkpoint that it came from")
    model, made = trained.model, trained.recipe
    if trained.form == "float":
        if arguments.calibrate is None:
            raise ValueError(f"{trained.title} is a float model: train it, or calibrate it with --calibrate DATA")
        model, made = _calibrated(trained, arguments)
    elif arguments.calibrate is not None:
        raise ValueError(f"{trained.title} has its ranges: leave out --calibrate")
    if trained.form != "int8":
        model = convert(model)
    if path.suffix == ONNX_SUFFIX:
        write_onnx(model, made, path, target=arguments.target)
    elif path.suffix == PROGRAM_SUFFIX:
        export_program(model, path, made.preprocessing.example())
    else:
        save_converted(model, path, metadata=metadata(made))
    # A program holds no preprocessing, and that of a float model was chosen just now.
    tells = path.suffix == PROGRAM_SUFFIX or trained.form == "float"
    said = f"; it reads images {made.preprocessing}" if tells else ""
    print(f"written: {path} ({path.stat().st_size / 1000:.1f} kB), from {trained.title}{said}")
    return 0


def _calibrated(trained: Trained, arguments: argparse.Namespace) -> tuple[nn.Module, ModelRecipe]:
    data = open_examples(arguments.calibrate, trained.preprocessing)
    qconfig = mapping_to_data(find_qconfig(arguments.qconfig))
    made = ModelRecipe(trained.recipe.model, trained.recipe.model_arguments, qconfig, data.preprocessing, data.classes)
    model = prepare(made, trained.model)
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: arguments.images]
    batches = torch.split(chosen, _CALIBRATION_BATCH)
    calibrate(model, (stacked(data.train, batch.tolist())[0] for batch in batches))
    return model, made
