"""Write torch.fx graphs as plain data, and read them back, so that a checkpoint holds no executable code.

Functions are stored by name and looked up in a fixed table of torch, operator and math functions. A file from someone
else can't name any other function.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import fx

_OPERATORS = (
    "add sub mul truediv floordiv mod pow matmul neg pos abs and_ or_ xor invert lshift rshift "
    "lt le eq ne ge gt not_ getitem is_ is_not contains"
)
_MATH = "ceil floor sqrt log log2 exp pow prod gcd trunc"
_NAME = re.compile(r"[A-Za-z_]\w*\Z")
_MODULE_PATH = re.compile(r"[\w-]+(\.[\w-]+)*\Z")
_TORCH_CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}

NodeData = dict[str, Any]
GraphData = list[NodeData]


# Whether a model is traced on arguments that it ran on just before.
_TRACED_AS_RUN: ContextVar[bool] = ContextVar("traced_as_run", default=False)


@contextmanager
def traced_as_run() -> Iterator[None]:
    """Let :func:`check_argument` accept, in the block, a tensor for an argument that was None.

    Some forwards make masks in place of None when they are traced. The block is meant for tracing a model that has just
    run on the same arguments, with None.
    """
    token = _TRACED_AS_RUN.set(True)
    try:
        yield
    finally:
        _TRACED_AS_RUN.reset(token)


def check_argument(value: Any, expected: Any, name: str) -> None:
    """Check that an argument of a forward has the value with which the model was prepared. Edited graphs call it.

    Args:
        value: the argument.
        expected: its value when the model was prepared.
        name: name of the argument in the message.

    Raises:
        ValueError: the value or its type differs. Within :func:`traced_as_run` a tensor may stand for None.
    """
    if isinstance(value, torch.Tensor) and expected is None and _TRACED_AS_RUN.get():
        return
    if value is not expected and (type(value) is not type(expected) or value != expected):
        got = type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)
        raise ValueError(
            f"{name} was {expected!r} when the model was prepared, got {got}; prepare the model with example_inputs "
            f"that lead to this value"
        )


@lru_cache(maxsize=1)
def _functions() -> dict[str, Callable[..., Any]]:
    """Return the functions that a graph may call, by the names that stand for them in plain data."""
    functional = torch.nn.functional
    table: dict[str, Callable[..., Any]] = {"getattr": getattr, "tritonq.check_argument": check_argument}
    table |= {f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()}
    table |= {f"math.{name}": getattr(math, name) for name in _MATH.split()}
    overridable = torch.overrides.get_overridable_functions()
    for namespace in (torch.special, torch.fft, torch.linalg, torch):
        for function in overridable[namespace]:
            table[f"{namespace.__name__}.{function.__name__}"] = function
    for name, function in vars(functional).items():
        if not name.startswith("_") and isinstance(function, (FunctionType, BuiltinFunctionType)):
            table[f"{functional.__name__}.{name}"] = function
    table["torch._assert"] = torch._assert
    return table


@lru_cache(maxsize=1)
def _names() -> dict[Callable[..., Any], str]:
    return {function: name for name, function in _functions().items()}


def graph_to_data(graph: fx.Graph) -> GraphData:
    """Return a graph as a list with one dict per node, which JSON can hold.

    For ``relu(x)`` the dict is ``{"name": "relu", "op": "call_function", "target": "torch.relu",
    "args": [{"node": "x"}], "kwargs": {}}``. Arguments that are no nodes are as :func:`constant_to_data` writes them.

    Raises:
        ValueError: a function outside of the table, a method that is none of ``torch.Tensor`` or not public, a private
            attribute, or an argument that is neither a node nor a constant.
    """
    return [_node_to_data(node) for node in graph.nodes]


def data_to_graph(data: GraphData) -> fx.Graph:
    """Return the torch.fx graph that plain data describe: the inverse of :func:`graph_to_data`.

    Args:
        data: a list with one dict per node, which has ``"op"``, ``"name"``, ``"target"``, ``"args"``, ``"kwargs"``.

    Raises:
        ValueError: data that don't describe a graph, or that call or read what :func:`graph_to_data` refuses.
    """
    if not isinstance(data, list):
        raise ValueError(f"a graph must be a list of nodes, got {type(data).__qualname__}")
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data:
        if not isinstance(entry, dict) or not {"op", "name", "target", "args", "kwargs"} <= entry.keys():
            raise ValueError(f"a graph node needs op, name, target, args and kwargs, got {entry!r}")
        with _refusing(f"not a node of a graph: {entry!r}"):
            name, args = _check_name(entry["name"]), entry["args"]
            nodes[name] = graph.create_node(
                entry["op"],
                _target_from_data(entry["op"], entry["target"], args),
                tuple(_from_data(arg, nodes) for arg in args),
                {_check_name(key): _from_data(arg, nodes) for key, arg in entry["kwargs"].items()},
                name=name,
            )
    return graph


@contextmanager
def _refusing(message: str) -> Iterator[None]:
    """Turn an error of the block about data of another form into a ValueError with ``message``."""
    try:
        yield
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(message) from error


def constant_to_data(value: Any) -> Any:
    """Return a constant as plain data, which JSON can hold: ``(1, None)`` gives ``{"tuple": [1, None]}``.

    None, bools, integers, texts and finite floats stay, and a list becomes a list of its items, written likewise. Other
    constants become a dict with their kind as the one key: tuples (also ``torch.Size``), dicts (``{"dict": [[key,
    value], ...]}``), slices (``{"slice": [start, stop, step]}``), ``...`` (``{"ellipsis": True}``), devices, dtypes,
    layouts and memory formats (``{"dtype": "float32"}``), and floats that are not finite (``{"float": "inf"}``).

    Raises:
        ValueError: an object of another class, such as a tensor or a named tuple, also within these.
    """
    return _to_data(value)


def constant_from_data(data: Any) -> Any:
    """Return the constant that plain data describe: ``{"tuple": [1, None]}`` gives ``(1, None)``.

    It is the inverse of :func:`constant_to_data`. Finite numbers, bools, texts and None stand for themselves, a list
    for a list of constants. Anything else is a dict with one key, the kind:

    - ``"tuple"``: its entries; ``"dict"``: pairs ``[key, value]``; ``"slice"``: ``[start, stop, step]``.
    - ``"ellipsis"``: True; ``"float"``: ``"inf"``, ``"-inf"`` or ``"nan"``; ``"device"``: such as ``"cuda:0"``.
    - ``"dtype"``, ``"memory_format"``, ``"layout"``: the name in torch, such as ``"float32"``.

    Raises:
        ValueError: data that don't describe one.
    """
    with _refusing(f"not a constant: {data!r}"):
        return _from_data(data, {})


def _node_to_data(node: fx.Node) -> NodeData:
    """Return one node as a dict with name, op, target, args and kwargs.

    Raises:
        ValueError: it calls a function outside of the table, or has an argument that is no plain constant.
    """
    target = node.target
    if node.op == "call_function":
        name = _names().get(target) if isinstance(target, Callable) else None  # type: ignore[arg-type]
        if name is None:
            raise ValueError(f"{getattr(target, '__name__', target)} is not a torch, operator or math function")
        target = name
    data: NodeData = {
        "name": node.name,
        "op": node.op,
        "target": str(target),
        "args": [_to_data(arg) for arg in node.args],
        "kwargs": {key: _to_data(arg) for key, arg in node.kwargs.items()},
    }
    _target_from_data(node.op, data["target"], data["args"])
    return data


def _target_from_data(op: str, target: Any, args: list[Any]) -> Any:
    """Return what a node calls: the function for its name in the table, else the name itself, checked.

    Args:
        op: opcode of torch.fx, such as "call_function".
        target: the target in plain data, always a text.
        args: positional arguments of the node, as plain data.

    Raises:
        ValueError: the target could run other code than tensor functions.
    """
    if not isinstance(target, str):
        raise ValueError(f"the target of a graph node must be a string, got {target!r}")
    if op == "call_function":
        if target not in _functions():
            raise ValueError(f"unknown function {target!r} in a graph")
        if target == "getattr" and not (len(args) > 1 and isinstance(args[1], str) and _is_public(args[1])):
            raise ValueError(f"a graph may read public attributes only, got {args[1:]!r}")
        return _functions()[target]
    if op == "call_method":
        if not _is_public(target) or not callable(getattr(torch.Tensor, target, None)):
            raise ValueError(f"{target!r} is not a method of torch.Tensor")
    elif op in ("call_module", "get_attr"):
        if not _MODULE_PATH.match(target):
            raise ValueError(f"{target!r} is not the path of a submodule or tensor")
    elif op == "placeholder":
        _check_name(target.lstrip("*"))
    elif op != "output":
        raise ValueError(f"unknown graph operation {op!r}")
    return target


def _is_public(name: str) -> bool:
    return bool(_NAME.match(name)) and not name.startswith("_")


def _check_name(name: Any) -> str:
    """Return a name; raise ValueError if it is no Python name."""
    if not isinstance(name, str) or not _NAME.match(name) or keyword.iskeyword(name):
        raise ValueError(f"{name!r} is not a Python name")
    return name


def _to_data(item: Any) -> Any:
    """Return an argument of a node as plain data; a node becomes ``{"node": name}``.

    Finite numbers, texts, None and lists stay; others become a dict of their kind, such as ``{"tuple": [...]}``.

    Raises:
        ValueError: an object of another class.
    """
    if isinstance(item, fx.Node):
        return {"node": item.name}
    if item is None or type(item) in (bool, int, str):
        return item
    if type(item) is float:
        return item if math.isfinite(item) else {"float": repr(item)}
    if type(item) in (list, fx.immutable_collections.immutable_list):
        return [_to_data(child) for child in item]
    if type(item) in (tuple, torch.Size):
        return {"tuple": [_to_data(child) for child in item]}
    if type(item) in (dict, fx.immutable_collections.immutable_dict):
        return {"dict": [[_to_data(key), _to_data(child)] for key, child in item.items()]}
    if isinstance(item, slice):
        return {"slice": [_to_data(part) for part in (item.start, item.stop, item.step)]}
    if item is Ellipsis:
        return {"ellipsis": True}
    if isinstance(item, torch.device):
        return {"device": str(item)}
    for kind, cls in _TORCH_CONSTANTS.items():
        if isinstance(item, cls):
            return {kind: str(item).removeprefix("torch.")}
    raise ValueError(f"a forward holds a {type(item).__qualname__}, which can't be stored as plain data")


def _from_data(item: Any, nodes: dict[str, fx.Node]) -> Any:
    """Return the argument that :func:`_to_data` described; ``nodes`` holds the nodes before it by name.

    Raises:
        ValueError: data of another form.
    """
    if isinstance(item, list):
        return [_from_data(child, nodes) for child in item]
    if not isinstance(item, dict):
        return item
    if len(item) != 1:
        raise ValueError(f"not an argument of a graph node: {item!r}")
    ((kind, content),) = item.items()
    if kind == "node":
        if content not in nodes:
            raise ValueError(f"a graph node reads {content!r}, which doesn't come before it")
        return nodes[content]
    if kind == "tuple":
        return tuple(_from_data(child, nodes) for child in content)
    if kind == "dict":
        return {_from_data(key, nodes): _from_data(child, nodes) for key, child in content}
    if kind == "slice":
        return slice(*(_from_data(part, nodes) for part in content))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "device":
        return torch.device(content)
    if kind in _TORCH_CONSTANTS and isinstance(getattr(torch, content, None), _TORCH_CONSTANTS[kind]):
        return getattr(torch, content)
    raise ValueError(f"not an argument of a graph node: {item!r}")
