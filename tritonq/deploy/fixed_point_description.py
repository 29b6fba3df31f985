"""The integer modules of a converted fixed-point network as plain data, and back.

A *description* is a module as a dict: ``"kind"`` (``"integer_layer"``, ``"integer_add"``, ``"integer_average"``,
``"integer_maximum"``, ``"relu"``) and what that kind needs, without tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tritonq.deploy.fixed_point_modules import (
    FixedPointFormat,
    IntegerAdd,
    IntegerAvgPool2d,
    IntegerLayer,
    IntegerModule,
    PoolingWindow,
)
from tritonq.nn.fixed_point_joins import FixedPointMaxPool2d

Description = dict[str, Any]

# What preparation puts where the float model has a function, nothing, or a module of another kind.
ADDED = ("integer_add", "integer_average", "relu")
_POOLING = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def has_integers(model: nn.Module) -> bool:
    """Whether a model is a converted fixed-point network: whether it holds any :class:`IntegerModule`."""
    return any(isinstance(module, IntegerModule) for module in model.modules())


def describe_integer(module: nn.Module) -> Description | None:
    """Return the description of a module of a converted fixed-point network; None if it is any other module.

    It is such as ``{"kind": "integer_maximum", "geometry": {"kernel_size": 2, …}}``, without the module's name. A plain
    ``nn.ReLU`` is described, too: in such a network it may stand for ``F.relu`` or for a ReLU6.
    """
    if isinstance(module, IntegerLayer):
        return {
            "kind": "integer_layer",
            "type": "Linear" if module.linear else "Conv2d",
            "geometry": _float_geometry(module),
            "input": dataclasses.asdict(module.input),
            "output": _format_to_data(module.output),
            "encodes": module.encodes,
            "decodes": module.decodes,
        }
    if isinstance(module, IntegerAdd):
        return {"kind": "integer_add", "bounds": list(module.bounds), "output": _format_to_data(module.output)}
    if isinstance(module, IntegerAvgPool2d):
        window, source = dataclasses.asdict(module.window), dataclasses.asdict(module.input)
        output = _format_to_data(module.output)
        return {"kind": "integer_average", "window": window, "input": source, "output": output}
    if isinstance(module, FixedPointMaxPool2d):
        return {"kind": "integer_maximum", "geometry": {name: getattr(module, name) for name in _POOLING}}
    return {"kind": "relu"} if type(module) is nn.ReLU else None


def build_integer(entry: Description, tensor: Callable[[str], Tensor]) -> nn.Module | None:
    """Return the module that ``entry`` describes; None for kinds of other networks.

    Args:
        entry: a description of :func:`describe_integer`, with the module's path as ``"name"``.
        tensor: returns a tensor of the file by its name in the module, such as ``"weight"``. The module may share its
            memory.

    Raises:
        ValueError, KeyError, TypeError: a description that lacks something or has something unknown, or what ``tensor``
            raises for one that is missing.
    """
    made = _build(entry, tensor)
    if isinstance(made, IntegerModule):
        made.name = entry["name"]
    return made


def _build(entry: Description, tensor: Callable[[str], Tensor]) -> nn.Module | None:
    kind = entry["kind"]
    if kind == "integer_layer":
        tensors = {name: tensor(name) for name in ("weight", "bias", "frac_len")}
        geometry, linear = entry["geometry"], entry["type"] == "Linear"
        names = ("stride", "padding", "dilation")
        runs = {name: (0, 0) if name == "padding" else (1, 1) for name in names} | {"groups": 1}
        if not linear:
            runs = {name: tuple(geometry[name]) for name in names} | {"groups": geometry["groups"]}
        ends = {"encodes": entry["encodes"], "decodes": entry["decodes"]}
        formats = FixedPointFormat(**entry["input"]), _format_from_data(entry["output"])
        return IntegerLayer(tensors, runs, *formats, **ends, linear=linear)
    if kind == "integer_add":
        finest = tensor("frac_len")
        first, second = (int(bound) for bound in entry["bounds"])
        frac_lens = (finest - tensor("left0"), finest - tensor("left1"))
        return IntegerAdd(frac_lens, (first, second), _format_from_data(entry["output"]))
    if kind == "integer_average":
        formats = FixedPointFormat(**entry["input"]), _format_from_data(entry["output"])
        return IntegerAvgPool2d(PoolingWindow(**entry["window"]), tensor("frac_len"), *formats)
    if kind == "integer_maximum":
        return FixedPointMaxPool2d(**entry["geometry"])
    return nn.ReLU() if kind == "relu" else None


def integer_difference(entry: Description, module: nn.Module) -> str | None:
    """Return how a module of the float model differs from the description ``entry``, as text; None if it fits.

    It fits if it is the Conv2d, Linear or MaxPool2d that the entry stands for, or of a class derived from it, and has
    the attributes in the entry's ``"geometry"``, such as ``kernel_size``; else the text is such as ``"Conv2d with
    stride=(1, 1) in the file, stride=(2, 2) in the model"``. Padding given as text, such as ``"same"``, is not
    compared. The entry must be of kind ``"integer_layer"`` or ``"integer_maximum"``.
    """
    kinds: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Conv2d": nn.Conv2d}
    expected = kinds[entry["type"]] if entry["kind"] == "integer_layer" else nn.MaxPool2d
    if not isinstance(module, expected):
        return f"{expected.__name__} in the file, {type(module).__name__} in the model"
    for key, saved in entry["geometry"].items():
        here = getattr(module, key)
        # padding="same" was resolved when the layer was made; its kernel size is compared.
        if not isinstance(here, str) and here != saved:
            return f"{expected.__name__} with {key}={saved} in the file, {key}={here} in the model"
    return None


def _float_geometry(layer: IntegerLayer) -> Description:
    """Return the attributes, by name, that the float layer in the place of ``layer`` must have.

    Of a linear layer ``in_features`` and ``out_features``; of a convolution channels, ``kernel_size`` and the integer
    layer's ``geometry``.
    """
    out, per_group, *kernel = layer.weight.shape
    if layer.linear:
        return {"in_features": per_group, "out_features": out}
    channels = {"in_channels": per_group * layer.geometry["groups"], "out_channels": out, "kernel_size": tuple(kernel)}
    return channels | layer.geometry


def _format_to_data(codes: FixedPointFormat | None) -> Description | None:
    return None if codes is None else dataclasses.asdict(codes)


def _format_from_data(data: Description | None) -> FixedPointFormat | None:
    return None if data is None else FixedPointFormat(**data)
