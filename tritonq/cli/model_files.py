"""Open any file that `train` wrote (.pt, .onnx), or a factory with weights, as a function of images to logits."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.cli.checkpoints import (
    ModelRecipe,
    check_names,
    is_training_file,
    load_state,
    load_weights,
    read_tensors,
    read_training,
)
from tritonq.cli.classification import logits
from tritonq.cli.data import DIGITS
from tritonq.cli.deployment import METADATA_KEY, onnx_session
from tritonq.cli.models import add_model_arguments, make_model, prepare
from tritonq.cli.preprocessing import (
    Preprocessing,
    add_preprocessing_arguments,
    choose_preprocessing,
    given_options,
    preprocessing_from_data,
)
from tritonq.deploy import load_converted, load_metadata
from tritonq.deploy.converted_file import FORMAT as CONVERTED

ONNX_SUFFIX, PROGRAM_SUFFIX = ".onnx", ".pt2"


@dataclass(frozen=True)
class Trained:
    """A model from a file of `train` or from a factory, with everything that is needed to classify images with it.

    Attributes:
        title: what it is, in words, such as ``"torchvision.models:resnet18, int8, from model.int8.pt"``.
        answer: from images float32 (n, channels, size, size) on the CPU to logits (n, classes) on the CPU.
        preprocessing: how images are scaled. Mean and deviation are both empty if neither file, options nor model give
            them. Whoever reads images must then find them, as `tritonq.cli.data.open_examples` does.
        classes: names by label; empty if no file tells them.
        recipe: how the model was made. Its ``qconfig`` is ``{}`` unless ``form`` is ``"qat"``; ``model``, the factory,
            is ``""`` for an ONNX file that does not tell it.
        model: the module, in eval mode; None for an ONNX file.
        form: what was opened: ``"qat"`` (a checkpoint of `train`), ``"int8"`` (a converted file), ``"float"`` (a
            factory, with a file of weights or without) or ``"onnx"``.
    """

    title: str
    answer: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    recipe: ModelRecipe
    model: nn.Module | None
    form: str

    def name_of(self, label: int) -> str:
        """Return the name of the class with this label, or the label as text, such as ``"3"``, if it has no name."""
        return self.classes[label] if label < len(self.classes) else str(label)


def add_trained_arguments(parser: argparse.ArgumentParser, *, onnx: bool = True) -> None:
    """Add the options that name a model and its file, and those for scaling images where no file holds that.

    They are ``MODEL``, ``--checkpoint FILE``, ``--model-arg KEY=VALUE`` and those of
    :func:`add_preprocessing_arguments`. ``onnx`` says whether the command takes ONNX files as well; only the help of
    ``MODEL`` depends on it.
    """
    origin = "module:factory of the float model, or an .onnx file" if onnx else "module:factory of the float model"
    parser.add_argument("model", metavar="MODEL", help=origin)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="best.pt, last.pt or model.int8.pt of `tritonq train`, or weights of the float model; without one, the "
        "model is what its factory gives",
    )
    add_model_arguments(parser)
    add_preprocessing_arguments(parser)


def open_trained(arguments: argparse.Namespace, data: str | None = None) -> Trained:
    """Return the model that the options name, as a `Trained`: with its function from images to logits.

    A file never chooses which code runs: the user names the factory, or an ONNX file, which needs none.

    Args:
        arguments: the parsed command line, with the options of :func:`add_trained_arguments`.
        data: the images that it is to classify: ``"digits"``, which are scaled in their own way, or a folder; None:
            they are not known, and taken for those of a folder.

    Raises:
        ValueError: a file that can't be read, is for torch.export.load, or was made with another factory, other
            ``--model-arg`` or for another architecture; a factory that can't be called; options for preprocessing that
            contradict each other, or that of the file.
        ImportError: an ONNX file without ONNX Runtime.
        RuntimeError: of a checkpoint, with rounding off the prepared model would not compute what the float one does.
    """
    spec, checkpoint, digits = arguments.model, arguments.checkpoint, data == DIGITS
    if spec.endswith(ONNX_SUFFIX):
        if checkpoint is not None:
            raise ValueError(f"{spec} holds its weights: leave out --checkpoint")
        return _from_onnx(Path(spec), arguments, digits)
    for path in (Path(spec), checkpoint):
        if path is not None and path.suffix == PROGRAM_SUFFIX and path.is_file():
            raise ValueError(f"{path} is for torch.export.load: name the checkpoint that it came from")
    if Path(spec).is_file():
        raise ValueError(
            f"{spec} holds no code: name its model's factory{_factory_in(Path(spec))}, and the file with --checkpoint"
        )
    if ":" not in spec:
        is_what = "a folder" if Path(spec).is_dir() else "no file"
        raise ValueError(
            f"{spec} is {is_what}: name an .onnx file, or the model's factory as module:factory and with --checkpoint "
            "a file that `train` wrote"
        )
    if checkpoint is None:
        return _float(arguments, digits, f"{spec}, as its factory gives it")
    if checkpoint.suffix == ONNX_SUFFIX:
        raise ValueError(f"{checkpoint} is a whole model: give it as MODEL, without --checkpoint")
    content = read_tensors(checkpoint)
    if is_training_file(content):
        return _from_training(checkpoint, arguments, digits)
    if content.get("format") == CONVERTED:
        return _from_converted(checkpoint, arguments, digits)
    return _float(arguments, digits, f"{spec} in float, with {checkpoint}", checkpoint)


def _from_training(path: Path, arguments: argparse.Namespace, digits: bool) -> Trained:
    made, content = read_training(path)
    _check_factory(path, made.model, arguments.model)
    _check_model_arguments(path, made.model_arguments, arguments)
    model = prepare(made)
    load_state(model, content["state_dict"], str(path))
    preprocessing = _own(path, arguments, made.preprocessing if made.preprocessing.mean else None, model, digits)
    title = f"{made.model}, quantization-aware, from {path}"
    return _module(title, model, preprocessing, made.classes, made, "qat")


def _from_converted(path: Path, arguments: argparse.Namespace, digits: bool) -> Trained:
    metadata = _checked(load_metadata(path), path)
    if metadata:
        _check_factory(path, metadata.get("model"), arguments.model)
        _check_model_arguments(path, metadata.get("model_arguments", ()), arguments)
    words = arguments.model_arg or list(metadata.get("model_arguments", ()))
    model = make_model(arguments.model, words)
    preprocessing = _own(path, arguments, _preprocessing_in(metadata, path), model, digits)
    model = load_converted(path, model)
    made = ModelRecipe(arguments.model, tuple(words), {}, preprocessing, tuple(metadata.get("classes", ())))
    return _module(f"{arguments.model}, int8, from {path}", model, preprocessing, made.classes, made, "int8")


def _float(arguments: argparse.Namespace, digits: bool, title: str, weights: Path | None = None) -> Trained:
    model = make_model(arguments.model, arguments.model_arg)
    if weights is not None:
        load_weights(model, weights)
    preprocessing = choose_preprocessing(arguments, model, digits)
    made = ModelRecipe(arguments.model, tuple(arguments.model_arg), {}, preprocessing)
    return _module(title, model, preprocessing, (), made, "float")


def _from_onnx(path: Path, arguments: argparse.Namespace, digits: bool) -> Trained:
    answer, properties = onnx_session(path)
    metadata = _metadata_in(properties, path)
    preprocessing = _own(path, arguments, _preprocessing_in(metadata, path), nn.Identity(), digits)
    classes = tuple(metadata.get("classes", ()))
    words = tuple(metadata.get("model_arguments", ()))
    made = ModelRecipe(metadata.get("model", ""), words, {}, preprocessing, classes)
    return Trained(f"{path}, in ONNX Runtime", answer, preprocessing, classes, made, None, "onnx")


def _module(
    title: str, model: nn.Module, preprocessing: Preprocessing, classes: tuple[str, ...], made: ModelRecipe, form: str
) -> Trained:
    return Trained(title, lambda images: logits(model, images), preprocessing, classes, made, model.eval(), form)


def _own(
    path: Path, arguments: argparse.Namespace, own: Preprocessing | None, model: nn.Module, digits: bool
) -> Preprocessing:
    """Return the preprocessing ``own`` of the file at ``path``; if that is None, the one that the options ask for.

    Raises:
        ValueError: the file has its own, and there are options for it.
    """
    given = given_options(arguments)
    if own is None:
        return choose_preprocessing(arguments, model, digits)
    if given:
        raise ValueError(f"{path} says how its images are scaled: leave out {', '.join(given)}")
    return own


def _metadata_in(properties: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Return what an ONNX file says of its model in ``properties``; ``{}`` if nothing."""
    try:
        metadata = json.loads(properties.get(METADATA_KEY, "{}"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: what it says of its model is no JSON") from error
    return _checked(metadata, path)


def _checked(metadata: Any, path: Path) -> dict[str, Any]:
    try:
        check_names(metadata)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return dict(metadata)


def _preprocessing_in(metadata: Mapping[str, Any], path: Path) -> Preprocessing | None:
    if "preprocessing" not in metadata:
        return None
    try:
        return preprocessing_from_data(metadata["preprocessing"])
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _check_factory(path: Path, saved: str | None, given: str) -> None:
    if saved is not None and saved != given:
        raise ValueError(f"{path} was made with {saved}, not with {given}")


def _check_model_arguments(path: Path, saved: Sequence[str], arguments: argparse.Namespace) -> None:
    given = arguments.model_arg
    if given and sorted(given) != sorted(saved):
        words = " ".join(f"--model-arg {word}" for word in saved) or "no --model-arg"
        raise ValueError(f"{path} was made with {words}, not with {', '.join(given)}: leave out --model-arg")


def _factory_in(path: Path) -> str:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        named = content.get("recipe", content.get("metadata", {})).get("model")
    except Exception:  # a hint that can't be given
        return ""
    return f" ({named} says the file)" if isinstance(named, str) else ""
