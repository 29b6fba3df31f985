"""The modules of a converted model as plain data, and back: what a saved file has beside its tensors.

A *description* is one module as a dict: ``"name"``, ``"kind"`` (``"layer"``, ``"quantizer"``, ``"module"``, ...) and
what that kind needs. A module's name is its path in the model, such as ``"features.0"``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from tritonq.deploy import fixed_point_description
from tritonq.deploy.computed import stand_ins
from tritonq.deploy.description_difference import by_name, class_name
from tritonq.deploy.embedding_tables import TABLE_TENSOR_NAMES, TABLE_TYPES, QuantizedTable
from tritonq.deploy.fixed_point_description import build_integer, describe_integer, has_integers
from tritonq.deploy.float_quantizer import FloatQuantizer
from tritonq.deploy.layer_types import LAYER_TYPES
from tritonq.deploy.modules import TENSOR_NAMES, CodeTypes, DeployedModule, QuantizedLayer, Quantizer
from tritonq.deploy.recurrent import RECURRENT_TYPES, QuantizedRecurrent
from tritonq.nn import (
    Add,
    Average,
    AverageLayer,
    Cat,
    FloatFunctional,
    Joint,
    MatMul,
    Maximum,
    Minimum,
    Mul,
    Sub,
)
from tritonq.nn.average_pool import POOL_TYPES
from tritonq.nn.clip import Clip, Clipping
from tritonq.nn.einsum import Einsum
from tritonq.nn.folded import FoldedBatchNorm
from tritonq.nn.functions import FunctionLayer, PReLU
from tritonq.nn.glu import GLU
from tritonq.nn.kept_class import made_class, users_class
from tritonq.nn.products import AddMatMul, ScaledDotProductAttention
from tritonq.nn.unary import UnaryLayer
from tritonq.prepare.edit.earlier_inputs import INPUTS, InputFakeQuants, InputPlace, hooked_forward
from tritonq.prepare.forwards.edited import forward_data
from tritonq.prepare.forwards.graph import ForwardData
from tritonq.quantized_type import QuantizedType
from tritonq.reference.average_pool import averaging_from_data, averaging_to_data
from tritonq.reference.functions import function_from_data, function_to_data

Description = dict[str, Any]

# By the kind of a description.
_JOINTS: dict[str, type[Joint]] = {cls.kind: cls for cls in (Add, Sub, Mul, MatMul, Minimum, Maximum)}
# Kinds that know the quantizers of the tensors that they read.
_LINKED = (*_JOINTS, "average", "pool", "function", "prelu", "clip")
_POOL_GEOMETRY = (
    *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override", "output_size"),
)
# Kinds that conversion, or preparation before it, may put where the float model has no module, or another.
ADDED = (
    *("quantizer", "inputs", *_JOINTS, "cat", "average", "function", "clip", "identity", "sequential"),
    *fixed_point_description.ADDED,
)


def describe_modules(model: nn.Module) -> list[Description]:
    """Return one description per module name of a converted model, parents first; ready for JSON.

    A module with several names has one description, and entries of kind ``"alias"`` whose ``"of"`` is its first name.
    Besides what its kind needs a description has:

    - ``"forward"``: the edited forward as plain data; None if the forward is the class's own.
    - ``"keeps_class"``, True: only if the module is also of the class of the user's module that it replaced
      (:func:`~tritonq.nn.kept_class.keep_class`).
    - ``"operands"``: for a join that is no concatenation the names of the quantizers of the two tensors that it joins;
      for a function, PReLU, clip, mean or pool those of the quantizers of input and output. None stands for an unknown
      one.
    - ``"quantizer_behind_clip"``: for a layer the name of the quantizer of the clip behind it; only if there is one.

    Raises:
        ValueError: a module that conversion made and that has no form in a file.
    """
    first_names: dict[nn.Module, str] = {}
    found = []
    integers = has_integers(model)
    for name, module in model.named_modules(remove_duplicate=False):
        first = first_names.setdefault(module, name)
        if first == name:
            described = describe_integer(module) if integers else None
            described = described or _describe(module)
            if made_class(module) is not users_class(module):
                described["keeps_class"] = True
            found.append({"name": name, **described, "forward": forward_data(module)})
        else:
            found.append({"name": name, "kind": "alias", "of": first})
    for entry in found:
        if entry["kind"] in _LINKED:
            sources = cast(Joint | UnaryLayer, model.get_submodule(entry["name"])).linked_quantizers
            entry["operands"] = [None if source is None else first_names.get(source) for source in sources]
        elif entry["kind"] == "layer":
            behind = cast(QuantizedLayer, model.get_submodule(entry["name"])).quantizer_behind_clip
            if behind is not None:
                entry["quantizer_behind_clip"] = first_names[behind]
    return found


def link_operands(modules: Mapping[str, nn.Module], entries: list[Description]) -> None:
    """Give rebuilt modules their references to quantizers, which a file holds by name.

    Modules with ``"operands"`` then return the quantizers of these names as ``linked_quantizers``, None for an unknown
    one; layers with ``"quantizer_behind_clip"`` return that quantizer as their property ``quantizer_behind_clip``.
    Other descriptions are passed over.

    Args:
        modules: the modules of the rebuilt model by name, changed in place.
        entries: their descriptions, from :func:`describe_modules`.

    Raises:
        KeyError: ``modules`` lacks a name, or a description of such a module has no ``"operands"``.
    """
    for entry in entries:
        if entry["kind"] in _JOINTS:
            a, b = (None if name is None else _producer(modules, name) for name in entry["operands"])
            cast(Joint, modules[entry["name"]]).set_producers(a, b)
        elif entry["kind"] in _LINKED:
            a, b = (None if name is None else modules[name] for name in entry["operands"])
            cast(UnaryLayer, modules[entry["name"]]).set_quantizers(a, b)
        elif "quantizer_behind_clip" in entry:
            layer = cast(QuantizedLayer, modules[entry["name"]])
            layer.set_quantizer_behind_clip(modules[entry["quantizer_behind_clip"]])


def _producer(modules: Mapping[str, nn.Module], quantizer: str) -> nn.Module:
    """Return the module whose output a quantizer rounds: the quantizer's parent, or the quantizer itself.

    It is the parent if the quantizer's own name is ``"activation_post_process"``.
    """
    owner, _, child = quantizer.rpartition(".")
    return modules[owner] if child == "activation_post_process" else modules[quantizer]


def _describe(module: nn.Module) -> Description:
    if isinstance(module, QuantizedLayer):
        return {
            "kind": "layer",
            "type": module.float_type.__name__,
            "geometry": module.geometry,
            "ceiling": module.ceiling,
            "weight": _grid_to_data(module.types.weight),
            "input": _grid_to_data(module.types.input),
            "tensors": [name for name in TENSOR_NAMES if getattr(module, name) is not None],
            "target": module.target,
            **({"takes_weight": True} if module.takes_weight else {}),
        }
    if isinstance(module, QuantizedTable):
        grid = _grid_to_data(module.qtype)
        described = {"kind": "table", "type": module.float_type.__name__, "geometry": module.geometry, "weight": grid}
        return {**described, "target": module.target}
    if isinstance(module, QuantizedRecurrent):
        return {
            "kind": "recurrent",
            "type": module.float_type.__name__,
            "geometry": module.geometry,
            "weights": {name: _grid_to_data(grid) for name, grid in module.types.items()},
            "tensors": [name for name in module.tensor_names if module.held(name) is not None],
            "target": module.target,
        }
    if isinstance(module, (Quantizer, FloatQuantizer)):
        return {"kind": "quantizer", "grid": _grid_to_data(module.qtype)}
    if isinstance(module, Joint):
        return {"kind": module.kind, "ceiling": module.ceiling, **_further(module)}
    kind = made_class(module)
    if isinstance(module, FunctionLayer):
        return {"kind": "function", "type": module.source_type, "function": function_to_data(module.function)}
    if isinstance(module, Clip):
        bounds = {"low": module.own.low, "high": module.own.high}
        earlier = {} if module.earlier is None else {"earlier": [module.earlier.low, module.earlier.high]}
        return {"kind": "clip", "type": module.source_type, **bounds, **earlier}
    if isinstance(module, PReLU):
        return {"kind": "prelu", "num_parameters": module.num_parameters}
    if kind is Average:
        return {"kind": "average", "averaging": averaging_to_data(cast(Average, module).averaging)}
    if isinstance(module, AverageLayer):
        pool = next(source for source, made in POOL_TYPES.items() if kind is made)
        geometry = {key: getattr(module, key) for key in _POOL_GEOMETRY if hasattr(module, key)}
        return {"kind": "pool", "type": pool.__name__, "geometry": geometry}
    if kind is Cat:
        return {"kind": "cat", "dim": module.dim, "arrangement": module.arrangement}
    if kind is FloatFunctional:
        return {"kind": "functional"}
    if isinstance(module, FoldedBatchNorm):
        return {"kind": "identity", "folded": [module.kind, module.layer]}
    if kind is nn.Identity:
        return {"kind": "identity"}
    if isinstance(module, InputFakeQuants):
        return {"kind": "inputs", "places": [dataclasses.asdict(place) for place in module.places]}
    if type(module) is nn.Sequential:
        return {"kind": "sequential"}
    if isinstance(module, DeployedModule):
        raise ValueError(f"{type(module).__name__} has no form in a file of converted models")
    found = {"kind": "module", "type": class_name(module)}
    return {**found, "stand_ins": stand_ins(module)} if stand_ins(module) else found


def _further(join: Joint) -> Description:
    """Return the entries that tell what is computed besides the operation of the join's kind; empty: nothing.

    They are ``"equation"`` of an einsum, ``"product": True`` of baddbmm and the like, ``"halved"`` with the axis of a
    GLU, and ``"attention": True``.
    """
    if isinstance(join, Einsum):
        return {"equation": join.equation}
    if isinstance(join, AddMatMul):
        return {"product": True}
    if isinstance(join, GLU):
        return {"halved": join.dim}
    return {"attention": True} if isinstance(join, ScaledDotProductAttention) else {}


def build_module(entry: Description, tensors: Mapping[str, Tensor]) -> nn.Module | None:
    """Return the module that ``entry`` describes, without the children that have entries of their own.

    None for kind ``"module"``: such a module comes from the user's float model. For kind ``"sequential"`` an empty
    Sequential, which holds the children described apart. The caller handles aliases, and what the entry has under
    ``"forward"``, ``"keeps_class"``, ``"operands"`` and ``"quantizer_behind_clip"``.

    Args:
        entry: a description.
        tensors: the file's tensors, by their names in the model, such as ``"features.0.weight"``. The module may share
            their memory.

    Raises:
        ValueError: an unknown kind or type, or a tensor that is missing or has the wrong shape.
        KeyError, TypeError: a description that lacks something, or has something unknown.
    """
    kind, name = entry["kind"], entry["name"]
    made_of_integers = build_integer(entry, lambda key: _tensor(tensors, _join(name, key)))
    if made_of_integers is not None:
        return made_of_integers
    if kind == "layer":
        cls = by_name(LAYER_TYPES, entry["type"])
        types = CodeTypes(_grid_from_data(entry["weight"]), _grid_from_data(entry["input"]))
        held: dict[str, Tensor | None] = {key: _tensor(tensors, _join(name, key)) for key in entry["tensors"]}
        layer = cls(entry["geometry"], types, held, _ceiling(entry))
        layer.target = entry.get("target")  # files of versions before 0.2 don't say it
        layer.takes_weight = bool(entry.get("takes_weight"))
        return layer
    if kind == "table":
        make: Callable[..., QuantizedTable] = by_name(TABLE_TYPES, entry["type"])
        table = make(
            entry["geometry"],
            _grid_from_data(entry["weight"]),
            {key: _tensor(tensors, _join(name, key)) for key in TABLE_TENSOR_NAMES},
        )
        table.target = entry.get("target")
        return table
    if kind == "recurrent":
        weights = {key: _grid_from_data(grid) for key, grid in entry["weights"].items()}
        kept = {key: _tensor(tensors, _join(name, key)) for key in entry["tensors"]}
        recurrent = by_name(RECURRENT_TYPES, entry["type"])(entry["geometry"], weights, kept)
        recurrent.target = entry.get("target")
        return recurrent
    if kind == "quantizer":
        grid = _grid_from_data(entry["grid"])
        if grid is None:
            raise ValueError(f"the quantizer {name!r} has no grid")
        if grid.float_format is not None:
            return FloatQuantizer(grid, _tensor(tensors, _join(name, "scale")))
        return Quantizer(grid, _tensor(tensors, _join(name, "scale")), _tensor(tensors, _join(name, "zero_point")))
    if kind in _JOINTS:
        if "equation" in entry:
            return Einsum(entry["equation"], _ceiling(entry))
        if entry.get("product"):
            return AddMatMul(_ceiling(entry))
        if "halved" in entry:
            return GLU(entry["halved"], _ceiling(entry))
        return ScaledDotProductAttention() if entry.get("attention") else _JOINTS[kind](_ceiling(entry))
    if kind == "average":
        return Average(averaging_from_data(entry["averaging"]))
    if kind == "function":
        return FunctionLayer(function_from_data(entry["function"]), source_type=entry["type"])
    if kind == "clip":
        earlier = Clipping(*map(float, entry["earlier"])) if "earlier" in entry else None
        own = Clipping(float(entry["low"]), float(entry["high"]))
        return Clip(own, earlier=earlier, source_type=entry["type"])
    if kind == "prelu":
        return PReLU(entry["num_parameters"])
    if kind == "pool":
        pool: nn.Module = by_name(POOL_TYPES, entry["type"])(**entry["geometry"])
        return pool
    if kind == "cat":
        return Cat(entry["dim"], arrangement=entry.get("arrangement", "cat"))
    if kind == "inputs":
        places = [_place_from_data(place) for place in entry["places"]]
        return InputFakeQuants(places, [nn.Identity() for _ in places])
    if "folded" in entry:
        return FoldedBatchNorm(*entry["folded"])
    plain: dict[str, Callable[[], nn.Module]] = {
        "functional": FloatFunctional,
        "identity": nn.Identity,
        "sequential": nn.Sequential,
    }
    if kind in plain:
        return plain[kind]()
    if kind == "module":
        return None
    raise ValueError(f"unknown kind of module {kind!r}")


def described_forward(entry: Description, entries: list[Description]) -> ForwardData | None:
    """Return the edited forward of a module, as plain data that ``apply_forward`` takes; None if it is the class's own.

    In files of versions 1 to 3 of the format an entry may name hooks (``"hooks"``, such as ``["quantize_output"]``),
    which quantized arguments or the result. The forward that is returned for such an entry does what the hooks did.

    Args:
        entry: the module's description.
        entries: those of all modules; the one of kind ``"inputs"`` tells which arguments a hook quantized.

    Raises:
        ValueError: an unknown hook.
    """
    data: ForwardData | None = entry.get("forward")
    if not entry.get("hooks"):
        return data
    inputs = _join(entry["name"], INPUTS)
    places = next((other["places"] for other in entries if other["name"] == inputs and other["kind"] == "inputs"), ())
    return hooked_forward(data, entry["hooks"], [_place_from_data(place) for place in places])


def _place_from_data(place: Mapping[str, Any]) -> InputPlace:
    return InputPlace(**{**place, "path": tuple(place["path"])})


def _ceiling(entry: Description) -> float | None:
    """Return the upper bound of a layer's ReLU: infinity for a plain one; None without a ReLU.

    Files of version 1 only say whether there is a ReLU, which is a plain one.
    """
    if "relu" in entry:
        return math.inf if entry["relu"] else None
    ceiling: float | None = entry["ceiling"]
    return ceiling


def _grid_to_data(grid: QuantizedType | None) -> Description | None:
    return None if grid is None else grid.to_data()


def _grid_from_data(data: Description | None) -> QuantizedType | None:
    return None if data is None else QuantizedType(**data)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"the tensor {key!r} is missing")
    return tensors[key]
