"""Converted models in one file of tensors and plain data, loadable without training code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonq.deploy.computed import stand_in
from tritonq.deploy.description import (
    ADDED,
    Description,
    build_module,
    describe_modules,
    described_forward,
    link_operands,
)
from tritonq.deploy.description_difference import difference
from tritonq.deploy.files import save_atomically
from tritonq.deploy.modules import DeployedModule
from tritonq.deploy.packing import pack_weights, unpack_weights
from tritonq.functional.codes import carry_codes
from tritonq.nn.compile_wrapper import uncompiled
from tritonq.nn.folded import BATCH_NORM_NAMES
from tritonq.nn.kept_class import keep_class, users_class
from tritonq.prepare.edit.earlier_inputs import replace_hooks
from tritonq.prepare.edit.fuse import move_hooks
from tritonq.prepare.edit.swap import keep_attributes, kept_names, take_place
from tritonq.prepare.forwards.edited import apply_forward
from tritonq.prepare.record.snapshot import ModelSnapshot

FORMAT = "tritonq.converted"
# Version 1 knew no upper bound of a ReLU, version 2 no pools and means in integers, version 3 named hooks and knew no
# functions by table. Version 4 had no packed weights.
VERSION = 5


def save_converted(
    model: nn.Module, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a converted model to one file that ``torch.load(path, weights_only=True)`` reads.

    The file is a dict: ``format``, ``version``, ``modules`` (for each module a dict of plain data that describes it),
    ``state_dict`` (on the CPU, weights as integer codes; several per byte for layers and tables of 4 bits and fewer),
    ``packed`` (how to unpack), ``metadata`` where it is given, and ``sha256`` of modules, unpacked state and metadata.
    It is written under a temporary name, then renamed: ``path`` never holds half a model. The user's hooks are not
    saved.

    Args:
        model: a converted model, or what ``torch.compile`` made of one.
        path: file to write, in a folder that exists; a file of this name is replaced.
        metadata: what else a reader must know (preprocessing, class names), as data that JSON can hold;
            :func:`~tritonq.deploy.load_metadata` reads it.

    Raises:
        ValueError: ``model`` is not a converted model, or has a module of tritonq that such a file can't hold, or
            ``metadata`` is not data that JSON can hold.
        OSError: the file can't be written.

    Examples:
        >>> import tempfile
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> x = torch.randn(4, 3, 8, 8)
        >>> qat = tritonq.prepare_qat(model, example_inputs=x).train()
        >>> _ = qat(x)                         # training steps
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_converted(tritonq.convert(qat), f"{folder}/model.pt", metadata={"classes": ["ant", "bee"]})
        ...     load_metadata(f"{folder}/model.pt")
        {'classes': ['ant', 'bee']}
    """
    model = uncompiled(model)
    if not any(isinstance(module, DeployedModule) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is not a converted model: use convert first")
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    replace_hooks(model)
    modules = describe_modules(model)
    noted = None if metadata is None else _plain(dict(metadata))
    packed_state, packed = pack_weights(model, state)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "modules": modules,
        "state_dict": _in_few_storages(packed_state),
        "packed": packed,
        "sha256": checksum(modules, state, noted),
    }
    if noted is not None:
        content["metadata"] = noted
    save_atomically(path, content)


def load_converted(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Turn a new float model into the converted model that a file of :func:`save_converted` holds.

    Args:
        path: a file of :func:`save_converted`.
        model: a float model of the architecture that was prepared, itself not prepared, with any weights. It is changed
            in place and keeps its device.

    Returns:
        The converted model, in eval mode: ``model`` itself, or another module if ``model`` is a single layer.

    Raises:
        ValueError: the file is damaged, of another kind or of a newer version, or the model has another architecture
            (the message names the first module that differs). ``model`` is then unchanged.
        OSError: the file can't be read.

    Examples:
        >>> import copy, tempfile
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> x = torch.randn(4, 3, 8, 8)
        >>> qat = tritonq.prepare_qat(model, example_inputs=x).train()
        >>> _ = qat(x)                         # training steps
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tritonq.save_converted(tritonq.convert(qat), f"{folder}/model.pt")
        ...     int8 = load_converted(f"{folder}/model.pt", copy.deepcopy(model))
        >>> torch.equal(int8(x), qat.eval()(x))
        True
    """
    content = _read(path)
    snapshot = ModelSnapshot(model)
    try:
        return _rebuild(model, content["modules"], content["state_dict"])
    except (KeyError, TypeError, AttributeError) as error:
        snapshot.restore()
        raise ValueError(f"{os.fspath(path)} is damaged: {type(error).__name__} {error}") from error
    except ValueError as error:
        snapshot.restore()
        raise ValueError(f"{os.fspath(path)} does not fit {type(model).__name__}: {error}") from error
    except BaseException:
        snapshot.restore()
        raise


def load_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata that :func:`save_converted` was given for a file; ``{}`` if none.

    Raises:
        ValueError: a file that is damaged, of another kind or of a newer version.
        OSError: the file can't be read.

    Examples:
        >>> import tempfile, torch, tritonq
        >>> images = torch.randn(2, 1, 8, 8)
        >>> qat = tritonq.prepare_qat(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), example_inputs=images)
        >>> _ = qat(images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_converted(tritonq.convert(qat.eval()), f"{folder}/model.pt", metadata={"size": 8})
        ...     load_metadata(f"{folder}/model.pt")
        {'size': 8}
    """
    return dict(_read(path).get("metadata") or {})


def _read(path: str | os.PathLike[str]) -> Description:
    with Path(path).open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen types for files that are not its own, OSError too
            raise ValueError(f"{os.fspath(path)} is damaged, or not a file of save_converted") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)} is not a file of save_converted: it has no format {FORMAT!r}")
    version = content.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"{os.fspath(path)} has version {version}; this tritonq reads versions up to {VERSION}")
    modules, state = content.get("modules"), content.get("state_dict")
    if not isinstance(modules, list) or not isinstance(state, dict):
        raise ValueError(f"{os.fspath(path)} is damaged: it lacks modules or state_dict")
    try:
        state = unpack_weights(state, content.get("packed") or {})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged: its packed weights can't be read") from error
    if content.get("sha256") != checksum(modules, state, content.get("metadata")):
        raise ValueError(f"{os.fspath(path)} is damaged: its contents don't match their checksum")
    content["state_dict"] = {name: tensor.clone() for name, tensor in state.items()}
    return content


def _plain(item: Any) -> Any:
    """Return data that JSON can hold with Python's own types in place of subclasses, which torch's reader refuses.

    NumPy's float64 is a subclass of float, members of an enum of texts are of a subclass of str.
    """
    if isinstance(item, dict):
        return {_plain(key): _plain(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return (list if isinstance(item, list) else tuple)(map(_plain, item))
    if isinstance(item, str):
        return str.__str__(item)
    kind = next((kind for kind in (bool, int, float) if isinstance(item, kind)), None)
    return item if kind is None else kind(item)


def _in_few_storages(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors as parts of one storage per dtype; each storage adds some 200 bytes to a file."""
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, tensor in state.items():
        by_dtype.setdefault(tensor.dtype, []).append(name)
    parts: dict[str, Tensor] = {}
    for names in by_dtype.values():
        flat = torch.cat([state[name].reshape(-1) for name in names])
        for name, part in zip(names, torch.split(flat, [state[name].numel() for name in names]), strict=True):
            parts[name] = part.view(state[name].shape)
    return {name: parts[name] for name in state}


def checksum(modules: list[Description], state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None) -> str:
    """Return the sha256, in hexadecimal, of a file's contents: modules, tensors by name, and metadata.

    Args:
        modules: descriptions of :func:`describe_modules`, in the file's order.
        state: the unpacked state dict, on the CPU; name, dtype, shape and bytes of each tensor count, not the order.
        metadata: the user's; None if none was given, which gives another checksum than ``{}``.

    Raises:
        ValueError: metadata that JSON can't hold.
    """
    digest = hashlib.sha256(json.dumps(modules, sort_keys=True).encode())
    if metadata is not None:
        try:
            digest.update(json.dumps(metadata, sort_keys=True).encode())
        except TypeError as error:
            raise ValueError(f"metadata must be data that JSON can hold: {error}") from error
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rebuild(model: nn.Module, entries: list[Description], state: Mapping[str, Tensor]) -> nn.Module:
    _check_architecture(model, entries)
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    here = dict(model.named_modules(remove_duplicate=False))
    root = model
    placed: dict[str, nn.Module] = {}
    for entry in entries:
        name = entry["name"]
        made = placed[entry["of"]] if entry["kind"] == "alias" else build_module(entry, state)
        mine = _counterpart(here, name, entries)
        if made is None or (type(made) is nn.Sequential and type(mine) is nn.Sequential):
            made = cast(nn.Module, mine)
        else:
            made = made.to(device)
            if mine is not None:
                _take_place(mine, made, entry, state)
        if not name:
            root = made
        else:
            parent, _, child = name.rpartition(".")
            placed[parent]._modules[child] = made
        placed[name] = made
    for entry in entries:
        if entry["kind"] != "alias":
            forward = described_forward(entry, entries)
            if forward is not None:
                apply_forward(placed[entry["name"]], forward)
        for tensor in entry.get("stand_ins", ()):
            stand_in(placed[entry["name"]], tensor)
    link_operands(placed, entries)
    root.eval()
    _load_state(root, state)
    return root if isinstance(root, DeployedModule) else carry_codes(root)


def _take_place(mine: nn.Module, made: nn.Module, entry: Description, state: Mapping[str, Tensor]) -> None:
    """Give a deployed module the attributes, class and hooks of the float model's module that it replaces, in place.

    Args:
        mine: the float model's module.
        made: the deployed module.
        entry: the deployed module's description, of :func:`describe_modules`.
        state: the file's tensors, by name.
    """
    if entry["kind"] in ("sequential", "inputs"):
        return
    if entry["kind"] == "identity":
        keep_attributes(mine, made, without=BATCH_NORM_NAMES)
    else:
        take_place(mine, made)
    for registry in (made._parameters, made._buffers):
        for name in [name for name in kept_names(made) if f"{entry['name']}.{name}" not in state]:
            registry.pop(name, None)  # files of earlier versions hold no parameters of the user's on layers
    if entry.get("keeps_class"):
        keep_class(users_class(mine), made)
    move_hooks(mine, mine, made)


def _check_architecture(model: nn.Module, entries: list[Description]) -> None:
    """Raise ValueError unless each module of the file has its counterpart in the model, and the other way round.

    The message names the first module that is missing, differs (:func:`difference`) or is not in the file. What
    conversion or preparation adds (:data:`ADDED`) needs no counterpart, nor does what lies inside of a replaced module.
    """
    here = dict(model.named_modules(remove_duplicate=False))
    replaced: list[str] = []
    emptied: list[str] = []
    for entry in entries:
        name, kind = entry["name"], entry["kind"]
        if kind == "alias" or _is_below(name, replaced):
            continue
        module = _counterpart(here, name, entries)
        if module is None:
            if kind not in ADDED and not entry.get("takes_weight"):
                raise ValueError(f"the module {name!r} ({entry.get('type', kind)}) is missing in the model")
        else:
            found = difference(entry, module)
            if found is not None:
                raise ValueError(f"the module {name!r} differs: {found}")
        if kind == "sequential" and type(module) is not nn.Sequential:
            emptied.append(name)
        elif kind not in ("module", "sequential"):
            replaced.append(name)
    known = {entry["name"] for entry in entries}
    for name, module in here.items():
        if name not in known and not _is_below(name, [*replaced, *emptied]):
            raise ValueError(f"the module {name!r} ({type(module).__name__}) of the model is not in the file")


def _counterpart(here: Mapping[str, nn.Module], name: str, entries: list[Description]) -> nn.Module | None:
    """Return the model's module for a name in the file, or None; ``here`` has the model's modules by name.

    If a BatchNorm's activation was not absorbed, preparation made a Sequential of the BatchNorm's descendants, and
    joined their names with underscores.
    """
    if name in here:
        return here[name]
    parent, _, child = name.rpartition(".")
    if not any(entry["name"] == parent and entry["kind"] == "sequential" for entry in entries):
        return None
    below = {full.removeprefix(f"{parent}.").replace(".", "_"): found for full, found in here.items()}
    return below.get(child)


def _load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors that stayed in float into the model; all are compared before any is written.

    Raises:
        ValueError: a tensor is missing, foreign, or of another shape.
    """
    expected = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"the tensor {name!r} is missing in the file")
        saved = state[name]
        if tensor.shape != saved.shape:
            shapes = f"{tuple(saved.shape)} in the file, {tuple(tensor.shape)} in the model"
            raise ValueError(f"the tensor {name!r} has the shape {shapes}")
    foreign = next((name for name in state if name not in expected), None)
    if foreign is not None:
        raise ValueError(f"the tensor {foreign!r} of the file is not in the model")
    # The tensors of deployed modules are those of the file already.
    deployed = {name for name, module in model.named_modules() if isinstance(module, DeployedModule)}
    with torch.no_grad():
        for name, tensor in expected.items():
            owner, _, own_name = name.rpartition(".")
            if owner not in deployed or own_name in kept_names(model.get_submodule(owner)):
                tensor.copy_(state[name])


def _is_below(name: str, parents: list[str]) -> bool:
    return any(not parent or name.startswith(parent + ".") for parent in parents)
