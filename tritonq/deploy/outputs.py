"""Outputs of exported files: their names, the keys under which the model returns them, and results without tensors.

A *path* is the keys that lead to a tensor of a result: ``("boxes", 0)``.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tritonq.prepare.record.snapshot import preserved_random_state
from tritonq.prepare.record.structure import Path, tensors_in

_DEFAULT = "output"


def result_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a model's result, in the mode it is in, for positional ``args`` and named ``kwargs``, without gradients.

    Afterwards the random state of Python, NumPy and torch is as it was before.

    Raises:
        ValueError: the model raises an error on these arguments.
    """
    try:
        with torch.no_grad(), preserved_random_state(model):
            return model(*args, **kwargs)
    except Exception as error:  # whatever a user's forward raises
        raise ValueError(f"{type(model).__name__} can't be exported: on example_inputs it raises {error}") from error


def output_paths(result: Any) -> list[Path]:
    """Return for each tensor of a result its path: ``[("scores",), ("boxes", 0)]``; ``[()]`` for a single tensor.

    Paths are in the order of the result, a tuple, list, mapping or dataclass, which may be nested; ``[]`` without any
    tensor.
    """
    return [path for path, _ in tensors_in(result)]


def takes_what(forward: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that gives a function the signature of ``forward``, by which torch.export binds arguments.

    It sets ``__signature__`` and returns the function itself. ``functools.wraps`` won't do: for a method whose function
    wraps another, `inspect` would find a ``self``.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        return function

    return decorate


def return_tensors_alone(traced: nn.Module, result: Any) -> None:
    """Make a model that is traced return only its tensors, if its result also has text, numbers or a dataclass.

    It then returns a flat tuple, in the order of :func:`output_paths`, or a single tensor. Nothing changes if the
    result has only tensors and None, in containers that torch.export knows: of dataclasses those registered with it.

    Args:
        traced: the model, whose ``forward`` may be replaced.
        result: what it returned on the example inputs.
    """
    if all(isinstance(leaf, (Tensor, NoneType)) for leaf in tree_leaves(result)):
        return
    forward = traced.forward

    @takes_what(forward)
    def tensors_alone(*args: Any, **kwargs: Any) -> Any:
        tensors = [tensor for _, tensor in tensors_in(forward(*args, **kwargs))]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    traced.forward = tensors_alone


def return_no_text(traced: nn.Module, result: Any) -> None:
    """Make a model that is traced return None in place of text, which torch writes to a program but can't load.

    Args:
        traced: the model, whose ``forward`` may be replaced.
        result: what it returned on the example inputs. If it has text, a UserWarning says so; else nothing changes.
    """
    if not any(isinstance(leaf, str) for leaf in tree_leaves(result)):
        return
    warnings.warn("the program returns None in the place of text, which torch.export can't load", stacklevel=3)
    forward = traced.forward

    @takes_what(forward)
    def no_text(*args: Any, **kwargs: Any) -> Any:
        return tree_map(lambda leaf: None if isinstance(leaf, str) else leaf, forward(*args, **kwargs))

    traced.forward = no_text


def output_name(path: Path) -> str:
    """Return the name of the output at a path: its keys, joined by ``_``.

    If the path is empty, or its first key is no text, ``output`` stands before them. Characters other than letters,
    digits and ``_`` become ``_``.

    Examples:
        >>> output_name(()), output_name((1,)), output_name(("boxes",)), output_name(("scores", 0))
        ('output', 'output_1', 'boxes', 'scores_0')
    """
    parts = path if path and isinstance(path[0], str) else (_DEFAULT, *path)
    return re.sub(r"\W", "_", "_".join(map(str, parts)))


def name_outputs(model: Any, paths: Sequence[Path]) -> None:
    """Name the outputs of an exported ONNX program after their paths, by :func:`output_name`.

    All names stay if there are not as many outputs as paths. An output that is an input, too, keeps its name; one that
    is there twice has the name of its first path. If another tensor has an output's name, ``"output_"`` is put before
    it: ``"output_scores"``.

    Args:
        model: the program, an ``onnx_ir.Model``; changed in place.
        paths: paths of the outputs, in their order.
    """
    outputs = list(model.graph.outputs)
    if len(outputs) != len(paths):
        return
    final = list(model.graph.inputs)
    inner = {value.name for node in model.graph for value in node.outputs}
    taken = {value.name for value in final} | set(model.graph.initializers) | inner - {value.name for value in outputs}
    for value, path in zip(outputs, paths, strict=True):
        if any(value is other for other in final):
            continue
        name = output_name(path)
        while name in taken:
            name = f"{_DEFAULT}_{name}"
        value.name = name
        final.append(value)
        taken.add(name)
