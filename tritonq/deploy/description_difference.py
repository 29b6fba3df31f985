"""Whether the modules of a float model are those that a file of a converted model describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import fx, nn
from torch.jit import ScriptModule

from tritonq.deploy.embedding_tables import TABLE_TYPES
from tritonq.deploy.fixed_point_description import Description, integer_difference
from tritonq.deploy.layer_types import LAYER_TYPES
from tritonq.deploy.recurrent import RECURRENT_TYPES
from tritonq.nn import RepVGGBlock
from tritonq.nn.average_pool import POOL_TYPES
from tritonq.nn.clip import Clipping, clipping_of
from tritonq.nn.functions import function_of
from tritonq.nn.intrinsic import FusedModule
from tritonq.nn.original_class import original_class
from tritonq.reference.functions import Function, function_from_data

T = TypeVar("T")

_FLOAT_TYPES = (*LAYER_TYPES, *TABLE_TYPES, *POOL_TYPES, *RECURRENT_TYPES)


def difference(entry: Description, module: nn.Module) -> str | None:
    """Return how a module of the float model differs from the description ``entry``, as text; None if it fits.

    The text is such as ``"Conv2d with stride=(1, 1) in the file, stride=(2, 2) in the model"``. Weights are not
    compared. A module fits, by the kind of the description,

    - as a layer, table, pool or recurrent layer if it is of the class, or one derived from it, and the constructor's
      arguments (without ``bias``) are equal; of a fused row the first module is compared, of a RepVGG block ``conv3``;
    - as a layer or maximum pool of integers in fixed point, by :func:`integer_difference`;
    - as a function if its class's name, what it computes and its numbers are equal; as a clip if the bounds are;
    - as ``"prelu"`` if it is an ``nn.PReLU``; as ``"module"`` if its class's name is equal;
    - as any other kind, such as ``"quantizer"``, always.

    Raises:
        ValueError, KeyError: a damaged description, such as one of an unknown type of layer.
    """
    kind, here = entry["kind"], class_name(module)
    if kind in ("integer_layer", "integer_maximum"):
        return integer_difference(entry, module)
    if kind in ("layer", "table", "pool", "recurrent"):
        module = module[0] if isinstance(module, FusedModule) else module
        module = module.conv3 if isinstance(module, RepVGGBlock) else module
        if not isinstance(module, by_name({cls: cls for cls in _FLOAT_TYPES}, entry["type"])):
            return f"{entry['type']} in the file, {here} in the model"
        for key, saved in entry["geometry"].items():
            if getattr(module, key) != saved:
                return f"{entry['type']} with {key}={saved} in the file, {key}={getattr(module, key)} in the model"
    elif kind == "function" and entry["type"] != here:
        return f"{entry['type']} in the file, {here} in the model"
    elif kind == "function" and _function_here(module) != function_from_data(entry["function"]).steps[-1]:
        return f"{here} of other arguments in the file: {entry['function']}"
    elif kind == "clip" and clipping_of(module) != Clipping(entry["low"], entry["high"]):
        return f"{here} of other bounds in the file: {entry['low']:g}, {entry['high']:g}"
    elif kind == "prelu" and not isinstance(module, nn.PReLU):
        return f"PReLU in the file, {here} in the model"
    elif kind == "module" and entry["type"] != here:
        return f"{entry['type']} in the file, {here} in the model"
    return None


def _function_here(module: nn.Module) -> Function | None:
    """Return the function that a module of ``torch.nn`` computes, clips included.

    None if it is none of the known ones.
    """
    clipping = clipping_of(module)
    return function_of(module) if clipping is None else clipping.function


def class_name(module: nn.Module) -> str:
    """Return the ``__name__`` of a module's class: the user's where the class was replaced to edit the forward.

    All modules traced by torch.fx count as "GraphModule", and traced or scripted by torch.jit as "ScriptModule": their
    own names vary.
    """
    if isinstance(module, ScriptModule):  # a copy of what was traced has another class
        return ScriptModule.__name__
    return fx.GraphModule.__name__ if isinstance(module, fx.GraphModule) else original_class(module).__name__


def by_name(types: Mapping[type[nn.Module], T], name: str) -> T:
    """Return the value in ``types`` of the first class whose ``__name__`` is ``name``, such as ``"Conv2d"``.

    Raises:
        ValueError: no class has this name.
    """
    for float_type, made in types.items():
        if float_type.__name__ == name:
            return made
    raise ValueError(f"unknown layer type {name!r}")
