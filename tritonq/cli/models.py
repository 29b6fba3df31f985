"""Models and qconfigs named on the command line, and the files that a training run leaves."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.deploy.files import atomic_file
from tritonq.prepare import prepare_qat
from tritonq.qconfig import DEFAULT_PRESET, PRESETS, get_default_qat_qconfig, get_qconfig
from tritonq.qconfig_files import load_qconfig_mapping, mapping_from_data, mapping_to_data
from tritonq.qconfig_mapping import QConfigMapping

FORMAT = "tritonq.training"
VERSION = 1
TORCH_BACKENDS = ("fbgemm", "x86", "qnnpack", "onednn")


@dataclass(frozen=True)
class Recipe:
    """How to make a prepared model: plain data, so that a checkpoint holds it.

    Attributes:
        model: ``"module:factory"``.
        model_arguments: ``KEY=VALUE``, values as Python literals.
        qconfig: a qconfig mapping as :func:`~tritonq.qconfig_files.mapping_to_data` gives it.
        channels: of the images.
        size: side of the images.
    """

    model: str
    model_arguments: tuple[str, ...]
    qconfig: dict[str, Any]
    channels: int
    size: int

    def prepare(self, weights: Path | None = None) -> nn.Module:
        """A new model, prepared, in training mode; with ``weights``, those of a float state dict.

        Raises:
            ValueError: a model that can't be made or prepared, or weights of another architecture.
        """
        model = make_model(self.model, self.model_arguments)
        if weights is not None:
            load_weights(model, weights)
        example = torch.zeros(2, self.channels, self.size, self.size)
        example = example.copy_(torch.linspace(-1, 1, example.numel()).view_as(example))
        qconfig = mapping_from_data(self.qconfig)
        return prepare_qat(model, qconfig=qconfig, example_inputs=example, inplace=True).train()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every command with a user's model has."""
    parser.add_argument(
        "--model-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the factory, as a Python literal or a word; may be repeated: --model-arg num_classes=10",
    )
    parser.add_argument(
        "--qconfig",
        default=DEFAULT_PRESET,
        metavar="NAME|FILE.json",
        help=f"preset ({', '.join((*PRESETS, *TORCH_BACKENDS))}; torch.ao's first arithmetic as in fbgemm-v0), or a "
        f"file of tritonq.save_qconfig_mapping; default {DEFAULT_PRESET}",
    )
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="side that images are scaled to; default 32, 8 for digits"
    )
    parser.add_argument(
        "--channels", type=int, metavar="N", help="channels that the model reads: 3 repeats the one of grey digits"
    )


def make_model(spec: str, arguments: Sequence[str] = ()) -> nn.Module:
    """The model that ``"module:factory"`` makes; modules of the working directory are found too.

    Raises:
        ValueError: no such module or factory, arguments that it refuses, or a result that is no module.
    """
    module_name, _, factory_name = spec.partition(":")
    if not module_name or not factory_name:
        raise ValueError(f"a model is given as module:factory, such as torchvision.models:resnet18, got {spec!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        factory: Any = importlib.import_module(module_name)
    except Exception as error:  # an import runs the module, which may raise anything
        reason = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"the module {module_name!r} of {spec!r} can't be imported: {reason}") from error
    for part in factory_name.split("."):
        if not hasattr(factory, part):
            raise ValueError(f"the module {module_name!r} has no {factory_name!r}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise ValueError(f"{spec!r} is not a factory but a {type(factory).__name__}")
    try:
        model = factory(**dict(map(_argument, arguments)))
    except TypeError as error:
        raise ValueError(f"{spec} refuses its arguments ({', '.join(arguments) or 'none'}): {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} made a {type(model).__name__}, not a torch.nn.Module")
    return model


def find_qconfig(name: str) -> QConfigMapping:
    """The mapping that ``--qconfig`` names: a preset or a JSON file.

    Raises:
        ValueError: an unknown preset, or a file that holds no mapping.
        OSError: the file can't be read.
    """
    if name.endswith(".json"):
        try:
            return load_qconfig_mapping(name)
        except OSError as error:
            raise ValueError(f"{name} can't be read: {error}") from error
    backend, _, version = name.partition("-v")
    if backend in TORCH_BACKENDS and version in ("", "0", "1"):
        return QConfigMapping().set_global(get_default_qat_qconfig(backend, int(version or 1)))
    if name in PRESETS:
        return QConfigMapping().set_global(get_qconfig(name))
    raise ValueError(f"unknown preset {name!r}; known: {', '.join((*PRESETS, *TORCH_BACKENDS))}, or a .json file")


def recipe(arguments: argparse.Namespace, image_shape: Sequence[int]) -> Recipe:
    """What the command line says about the model, for images of this shape (channels, height, width)."""
    data = mapping_to_data(find_qconfig(arguments.qconfig))
    return Recipe(arguments.model, tuple(arguments.model_arg), data, image_shape[0], image_shape[-1])


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a float state dict, or the one under ``"state_dict"`` or ``"model"`` of a file; tensors alone are read.

    Raises:
        ValueError: a file that can't be read, or weights of another architecture; the message names the first tensor.
    """
    content = read_tensors(path)
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    load_state(model, content, os.fspath(path))


def load_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict into a model of the same architecture.

    Raises:
        ValueError: the first tensor that does not fit; the model is then as it was.
    """
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"{where} is of another architecture: it lacks {name!r}")
        if isinstance(tensor, Tensor) and state[name].shape != tensor.shape and tensor.numel():
            shapes = f"{tuple(state[name].shape)} there, {tuple(tensor.shape)} in the model"
            raise ValueError(f"{where} is of another architecture: {name!r} has shape {shapes}")
    for name in state:
        if name not in expected and not name.endswith(".freeze_bn"):
            raise ValueError(f"{where} is of another architecture: the model has no {name!r}")
    model.load_state_dict(state)


def save_training(path: Path, made: Recipe, state: dict[str, Any]) -> None:
    """Write a checkpoint: ``recipe`` and whatever ``state`` holds, ``"state_dict"`` among it."""
    with atomic_file(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, "recipe": asdict(made), **state}, file)


def read_training(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """A checkpoint of :func:`save_training`.

    Raises:
        ValueError: no such file, a damaged one, or one of another kind.
    """
    content = read_tensors(path)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise ValueError(f"{path} is no checkpoint of `tritonq train`, version {VERSION}")
    found = content["recipe"]
    known = {field.name for field in fields(Recipe)}
    if not isinstance(found, dict) or set(found) != known:
        raise ValueError(f"{path} is damaged: its recipe is not one")
    return Recipe(**{**found, "model_arguments": tuple(found["model_arguments"])}), content


def read_tensors(path: Path) -> dict[str, Any]:
    """A file of tensors and plain data.

    Raises:
        ValueError: it can't be read, or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for files that are not its own
        raise ValueError(f"{path} can't be read: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _argument(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise ValueError(f"an argument of the model is given as KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
