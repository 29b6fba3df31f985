"""Models, qconfigs and devices named on the command line."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tritonq.cli.checkpoints import ModelRecipe
from tritonq.cli.messages import named, reason_of
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.near_misses import did_you_mean
from tritonq.observers import PassiveObserver
from tritonq.prepare import prepare_qat
from tritonq.preset_mappings import get_qconfig_mapping
from tritonq.qconfig import DEFAULT_PRESET, PRESETS, TORCH_BACKENDS, get_default_qat_qconfig
from tritonq.qconfig_files import load_qconfig_mapping, mapping_from_data
from tritonq.qconfig_mapping import QConfigMapping
from tritonq.switched_quantizer import SwitchedQuantizer


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--model-arg KEY=VALUE``, which may be repeated, to a command that calls a user's factory.

    The parsed ``model_arg`` is a list of the texts as they were given, empty without the option. :func:`make_model`
    reads and checks them.
    """
    parser.add_argument(
        "--model-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the factory, as a Python literal or a word; may be repeated: --model-arg num_classes=10",
    )


def add_qconfig_argument(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """Add ``--qconfig``, which names a preset or a JSON file, to a command that prepares a model.

    The value is text, which :func:`find_qconfig` turns into a mapping; without the option it is the name of the default
    preset, "onnxruntime". ``prefix`` stands before the option's help.
    """
    parser.add_argument(
        "--qconfig",
        default=DEFAULT_PRESET,
        metavar="NAME|FILE.json",
        help=f"{prefix}preset ({', '.join((*PRESETS, *TORCH_BACKENDS))}; torch.ao's first arithmetic as in fbgemm-v0), "
        "or a file of tritonq.save_qconfig_mapping",
    )


def make_model(spec: str, arguments: Sequence[str] = ()) -> nn.Module:
    """Return the model that ``"module:factory"`` makes with the given ``KEY=VALUE`` arguments.

    Each ``VALUE`` is read as a Python literal, such as ``5`` or ``None``; what is no literal stays text. The working
    directory is put first on ``sys.path`` if it is not there yet. What modules and factories print goes to stderr.

    Raises:
        ValueError: ``spec`` is not ``"module:factory"``, such as a path; no such module or factory, or one that raises
            an error; an argument that is not written ``KEY=VALUE``, or a result that is no ``nn.Module``.
    """
    module_name, _, factory_name = spec.partition(":")
    if not module_name or not factory_name:
        raise ValueError(f"a model is given as module:factory, such as torchvision.models:resnet18, got {spec!r}")
    module = _import(module_name, factory_name)
    factory: Any = module
    for part in factory_name.split("."):
        if not hasattr(factory, part):
            near = did_you_mean(part, (name for name in dir(factory) if not name.startswith("_")))
            where = f" ({module.__file__})" if getattr(module, "__file__", None) else ""
            raise ValueError(f"the module {module_name!r}{where} has no {factory_name!r}{near}")
        factory = getattr(factory, part)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ValueError(f"{spec!r} is not a factory but a {type(factory).__name__}: name a function that returns one")
    words = dict(map(_argument, arguments))
    try:
        with redirect_stdout(sys.stderr):  # what a command itself prints may be read by a program
            model = factory(**words)
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        hint = "; --model-arg KEY=VALUE gives an argument" if isinstance(error, TypeError) else ""
        raise ValueError(f"{spec}({', '.join(arguments)}) raised {named(error)}{hint}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} returned an object of type {type(model).__name__}, not a torch.nn.Module")
    return model


def _import(name: str, factory: str) -> ModuleType:
    """Return the module of this name, of the working directory first, as ``python -m`` looks for it.

    Raises:
        ValueError: there is none, it fails or ends the program when it is imported, or ``name`` is a path.
    """
    if name.startswith(".") or name.endswith(".py") or "/" in name or "\\" in name:
        parts = name.removesuffix(".py").replace("\\", "/").split("/")
        dotted = ".".join(part.strip(".") for part in parts if part.strip("."))
        raise ValueError(f"a module is named as in an import, from the folder where it is found: {dotted}:{factory}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with redirect_stdout(sys.stderr):
            return importlib.import_module(name)
    except SystemExit as error:  # of a script that runs wherever it is imported
        reason = 'it ends the program: put what it does as a script under `if __name__ == "__main__":`'
        raise ValueError(f"the module {name!r} can't be imported: {reason}") from error
    except Exception as error:  # an import runs the module, which may raise anything
        reason = str(error) if isinstance(error, ImportError) else named(error)
        raise ValueError(f"the module {name!r} can't be imported: {reason}") from error


def prepare(made: ModelRecipe, model: nn.Module | None = None) -> nn.Module:
    """Return the prepared model that a model recipe describes, in training mode.

    ``model`` is its float model, which is changed in place; None: the model recipe's factory makes it.

    Raises:
        ValueError: a model that can't be made or prepared, or a qconfig of the model recipe that can't be read.
        RuntimeError: with rounding off the prepared model would not compute what the float model does.
    """
    model = make_model(made.model, made.model_arguments) if model is None else model
    qconfig = mapping_from_data(made.qconfig)
    return prepare_qat(model, qconfig=qconfig, example_inputs=made.preprocessing.example(), inplace=True).train()


def check_trains(model: nn.Module, preset: str) -> None:
    """Raise an error if a prepared model can't be trained, or would not round while it is.

    Args:
        model: the prepared model.
        preset: the ``--qconfig`` that it was prepared with, a preset or a JSON file, for the error's text.

    Raises:
        ValueError: no parameter of the model requires a gradient; or a fake quantizer of it is switched off, as presets
            for calibration have it, or has a PassiveObserver without a scale, which a program must give it.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    for name, quantizer in model.named_modules():
        if not isinstance(quantizer, SwitchedQuantizer):
            continue
        if not bool(quantizer.fake_quant_enabled):
            raise ValueError(f"{preset} is for tritonq.calibrate, and rounds nothing while a model is trained")
        is_passive = isinstance(getattr(quantizer, "activation_post_process", None), PassiveObserver)
        if is_passive and isinstance(quantizer, FakeQuantizeBase) and not quantizer.has_qparams():
            raise ValueError(f"{preset} observes nothing: a program has to give {name!r} its scale")


def find_qconfig(name: str) -> QConfigMapping:
    """Return the mapping that ``--qconfig`` names: by a preset, an engine of torch.ao, or a JSON file.

    A name that ends in ".json" is a file. torch.ao's engines ("fbgemm", "x86", "qnnpack", "onednn") give torch.ao's
    presets of version 1, and with "-v0", as in "fbgemm-v0", of version 0.

    Raises:
        ValueError: an unknown preset, or a file that can't be read or that holds no mapping.
    """
    if name.endswith(".json"):
        try:
            return load_qconfig_mapping(name)
        except OSError as error:
            raise ValueError(f"{name} can't be read: {reason_of(error)}") from error
    backend, _, version = name.partition("-v")
    if backend in TORCH_BACKENDS and version in ("", "0", "1"):
        return QConfigMapping().set_global(get_default_qat_qconfig(backend, int(version or 1)))
    if name in PRESETS:
        return get_qconfig_mapping(name)
    known = (*PRESETS, *TORCH_BACKENDS)
    near = did_you_mean(backend, known)
    raise ValueError(f"unknown preset {name!r}{near} (known: {', '.join(known)}, or a .json file)")


def find_device(name: str | None) -> torch.device:
    """Return the device that ``--device`` names, such as "cuda:1"; None: "cuda" if torch can use a GPU, else "cpu".

    Raises:
        ValueError: torch knows no such device, or can't use it on this machine.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device that torch knows: cpu, cuda, cuda:1, mps …") from error
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # one for each way of not having a driver
        raise ValueError(f"the device {name!r} can't be used here: {str(error).splitlines()[0]}") from error
    return device


def _argument(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise ValueError(f"an argument of the model is given as KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError):
        return key, value
