"""Checkpoints of a training run: tensors and plain data with a checksum.

A *model recipe* says how to make the model again: its factory with arguments, its qconfig, and how images are scaled.
(The recipe of `tritonq.recipes`, a learning rate and a schedule, is something else.) A file is written as a whole or
not at all. Reading one runs no code that it names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.cli.earlier_fields import with_defaults
from tritonq.cli.preprocessing import Preprocessing, preprocessing_from_data, preprocessing_to_data
from tritonq.deploy.files import save_atomically, why_unread
from tritonq.nn.batch_norm_layer import QATBatchNormLayer

FORMAT = "tritonq.training"
# Version 1 had no checksum, no class names, and of the preprocessing only channels and size.
VERSION = 2
# Where trainers put a model's weights, the outer keys first.
_STATE_KEYS = ("state_dict", "model_state_dict", "state_dict_ema", "model")


@dataclass(frozen=True)
class ModelRecipe:
    """How to make a prepared model and its inputs: plain data, so that a checkpoint can hold it.

    Attributes:
        model: module and name of the function or class that returns the float model: ``"torchvision.models:resnet18"``.
        model_arguments: its keyword arguments, values as Python literals, such as ``("num_classes=10",)``.
        qconfig: a qconfig mapping as :func:`~tritonq.qconfig_files.mapping_to_data` gives it.
        preprocessing: how images are scaled.
        classes: class names; the index is the label. Empty: unknown.
    """

    model: str
    model_arguments: tuple[str, ...]
    qconfig: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()


def recipe_to_data(made: ModelRecipe) -> dict[str, Any]:
    """Return a model recipe as a dict of plain data, for a checkpoint; keys are the names of its fields."""
    return {**asdict(made), "preprocessing": preprocessing_to_data(made.preprocessing)}


def recipe_from_data(data: Any) -> ModelRecipe:
    """Return the model recipe that :func:`recipe_to_data` turned into ``data``, also one of version 1 of the format.

    A field with a default that ``data`` lacks gets it.

    Raises:
        ValueError: ``data`` is no dict, lacks another field, has a key that is none, or a field of a wrong type.
    """
    if isinstance(data, Mapping) and "size" in data:
        size, channels = data["size"], data.get("channels")
        others = {key: value for key, value in data.items() if key not in ("size", "channels")}
        images = preprocessing_from_data({"size": size, "resize": size, "channels": channels})
        data = {**others, "preprocessing": preprocessing_to_data(images), "classes": ()}
    check_names(data)
    data = with_defaults(ModelRecipe, data)
    if set(data) != {field.name for field in fields(ModelRecipe)} or not isinstance(data["qconfig"], Mapping):
        raise ValueError("its recipe is not one")
    preprocessing = preprocessing_from_data(data["preprocessing"])
    listed = {name: tuple(data[name]) for name in ("model_arguments", "classes")}
    return ModelRecipe(**{**data, **listed, "preprocessing": preprocessing})


def check_names(data: Any) -> None:
    """Check the entries of ``data`` that describe a model: the factory, its arguments and the names of the classes.

    ``"model"`` has to be a text, ``"model_arguments"`` and ``"classes"`` lists or tuples of texts. An entry that is
    missing is no fault.

    Raises:
        ValueError: one of them is something else, or ``data`` is no dict. The text begins with "its" or "what it says":
            the caller puts the file's name before it.
    """
    if not isinstance(data, Mapping):
        raise ValueError("what it says of its model is no dict")
    for name, several in (("model", False), ("model_arguments", True), ("classes", True)):
        value = data.get(name, () if several else "")
        texts = (value if isinstance(value, (list, tuple)) else [None]) if several else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"its {name.replace('_', ' ')}: {value!r}")


def save_training(path: Path, made: ModelRecipe, state: dict[str, Any]) -> None:
    """Write a checkpoint with a SHA-256 of its content as the entry ``"sha256"``.

    Args:
        path: the file, in a folder that exists; an older one is replaced.
        made: how the model was made; the entry ``"recipe"`` holds it.
        state: all other entries by name, tensors and plain data. :func:`read_training` needs ``"state_dict"``. Not
            ``"format"``, ``"version"``, ``"recipe"`` or ``"sha256"``, which are written here.

    Raises:
        OSError: the file can't be written; an older one is then as it was.
    """
    content = {"format": FORMAT, "version": VERSION, "recipe": recipe_to_data(made), **state}
    content["sha256"] = _digest(content)
    save_atomically(path, content)


def read_training(path: Path) -> tuple[ModelRecipe, dict[str, Any]]:
    """Return the model recipe and all entries (weights, optimizer and so on) of a checkpoint of :func:`save_training`.

    Entries are by name, ``"recipe"`` among them and without the checksum. Tensors are on the CPU.

    Raises:
        ValueError: no such file, a damaged one, one of another kind or of a later version, or one without weights.
    """
    content = read_tensors(path)
    version = content.get("version")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of `tritonq train`")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(f"{path} has version {version}; this tritonq reads versions up to {VERSION}")
    if version > 1:
        checksum = content.pop("sha256", None)
        if checksum != _digest(content):
            raise ValueError(f"{path} is damaged: its contents don't match their checksum")
    try:
        check_entries(content, {"state_dict": Mapping})
        return recipe_from_data(content["recipe"]), content
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def check_entries(content: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that a checkpoint's ``content`` has every entry in ``expected``, such as ``{"state_dict": Mapping}``.

    A value of ``expected`` is the type that the entry must have, or a tuple of types of which it must have one.

    Raises:
        ValueError: an entry is missing or of another type. The text names the first, such as "it has no state dict".
    """
    for name, kind in expected.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"it has no {name.replace('_', ' ')}")


def is_training_file(content: Mapping[str, Any]) -> bool:
    """Whether ``content``, which :func:`read_tensors` read, says that it is a checkpoint of :func:`save_training`.

    Only its entry ``"format"`` is looked at, whatever the version.
    """
    return content.get("format") == FORMAT


def has_format(path: Path, name: str) -> bool:
    """Whether the file at ``path`` is a dict of ``torch.save`` whose entry ``"format"`` equals ``name``.

    False also if there is no such file, or it can't be read.
    """
    try:
        return bool(read_tensors(path).get("format") == name)
    except ValueError:
        return False


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the dict of tensors and plain data in a file of ``torch.save``, on the CPU; code in it is not run.

    A checksum is an entry like the others, and is not checked here: :func:`read_training` does that.

    Raises:
        ValueError: there is no such file, it can't be read, or it holds something other than a dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for files that are not its own
        raise ValueError(f"{path} can't be read: {why_unread(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights into a float model, in place, from a file with a state dict or with one under a key.

    Keys are ``"state_dict"``, ``"model_state_dict"``, ``"state_dict_ema"`` and ``"model"``, tried in this order. Code
    in the file is not run. Names may all have one prefix, such as ``"module."`` of DistributedDataParallel,
    ``"_orig_mod."`` of torch.compile or ``"model."`` of a Lightning module; entries without it are then left out.

    Raises:
        ValueError: a file that can't be read or holds something else, such as a checkpoint of `train` or a converted
            model; parameters that are not finite (buffers need not be), or weights of another architecture, where the
            message names the first tensor. The model is as it was.
    """
    content = read_tensors(path)
    if str(content.get("format")).startswith("tritonq."):
        kind = "a checkpoint of `tritonq train`" if is_training_file(content) else "a converted model"
        raise ValueError(f"{path} is {kind}, not the weights of a float model")
    for key in _STATE_KEYS:
        if isinstance(content.get(key), dict):
            content = content[key]
    nameless = [key for key in content if not isinstance(key, str)]
    if nameless:
        raise ValueError(f"{path} holds entries without names, such as {nameless[0]!r}: it is no state dict")
    state = _without_prefix(content, model.state_dict())
    for name, _ in model.named_parameters():  # buffers may hold masks of -inf
        tensor = state.get(name)
        if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path} can't be used: {name!r} is not finite")
    load_state(model, state, os.fspath(path))


def _without_prefix(state: dict[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of ``state`` whose names have one prefix, without it, if all expected names are among them.

    Otherwise ``state`` itself is returned.
    """
    first = next(iter(expected), "")
    for prefix in (name.removesuffix(first) for name in state if name.endswith(first)):
        if prefix and all(prefix + name in state for name in expected):
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return state


def load_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict into a model of the same architecture, in place; ``where`` names the file in errors.

    ``state`` may also have the key ``freeze_bn`` of each layer with a BatchNorm, such as ``"layer1.freeze_bn"``, which
    the model's own state dict has only while the layer is frozen. It freezes the layer; without it the layer stays as
    it is. The shape of a tensor that has no elements in the
    model, such as an observer's before the first batch, is not checked here.

    Raises:
        ValueError: the state dict lacks a tensor, has it in another shape or something else in its place, or has a key
            that the model lacks. The text names the first one, and the model is as it was.
    """
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"{where} is of another architecture: it lacks {name!r}")
        if not isinstance(tensor, Tensor):
            continue
        if not isinstance(state[name], Tensor):
            kind = type(state[name]).__name__
            raise ValueError(f"{where} is of another architecture: {name!r} is of type {kind}, not a tensor")
        if state[name].shape != tensor.shape and tensor.numel():
            shapes = f"{tuple(state[name].shape)} there, {tuple(tensor.shape)} in the model"
            raise ValueError(f"{where} is of another architecture: {name!r} has shape {shapes}")
    # Only the state dict of a frozen layer has the key.
    freezing = {
        f"{name}.freeze_bn".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, QATBatchNormLayer)
    }
    for name in state:
        if name not in expected and name not in freezing:
            raise ValueError(f"{where} is of another architecture: the model has no {name!r}")
    model.load_state_dict(state)


def _digest(content: Any) -> str:
    digest = hashlib.sha256()
    pending = [content]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            digest.update(f"tensor {item.dtype} {tuple(item.shape)}".encode())
            digest.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, Mapping):
            digest.update(f"mapping {len(item)}".encode())
            pending += [entry for pair in item.items() for entry in pair]
        elif isinstance(item, (list, tuple)):
            digest.update(f"sequence {len(item)}".encode())
            pending += item
        else:
            digest.update(f"{type(item).__name__} {item!r}".encode())
    return digest.hexdigest()
