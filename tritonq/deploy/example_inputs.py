"""The example inputs of exporters, and the axes of them that stay open: the file then takes other sizes there.

An axis is *open* if the traced graph has a symbol for its size, and *fixed* if it has a number. *Arguments* are a pair
of positional arguments and a dict of named ones. Sizes are those of the axes behind batch (0) and channels (1).
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.nn.call_arguments import names_taken
from tritonq.prepare.record.example import Arguments
from tritonq.prepare.record.snapshot import preserved_random_state
from tritonq.prepare.record.structure import replace_leaves, replace_tensors, tensors_in

# How many axes a tensor has that may have sizes: those behind batch and channels.
_RANKS = range(3, 6)


def open_axes(
    forward: Callable[..., Any], arguments: Arguments, batch: bool, sizes: bool
) -> tuple[Arguments, dict[str, Any] | None]:
    """Return arguments to trace with, and ``dynamic_shapes`` of torch.export, such as ``{"x": {0: Dim("batch")}}``.

    If ``batch`` and ``sizes`` are both False, the arguments are returned unchecked, and None for the shapes. In the
    shapes None stands for a tensor, or another value, without an open axis.
    To leave the batch open, a batch of one is doubled in the arguments that are returned: torch.export takes an example
    of size 1 for a constant.

    Args:
        forward: what is traced; the names of its parameters are the keys of the shapes.
        arguments: the example: positional and named arguments.
        batch: whether axis 0 is open, in all tensors where it has the same size as in the first one with axes.
        sizes: whether the axes behind the first two are open, in tensors with 3 to 5 axes.

    Raises:
        ValueError: ``batch`` or ``sizes`` is True, and no tensor has an axis.
        TypeError: ``batch`` or ``sizes`` is True, and the forward does not take the arguments.
    """
    if not batch and not sizes:
        return arguments, None
    first = next((tensor for _, tensor in tensors_in(arguments) if tensor.dim()), None)
    if first is None:
        raise ValueError("example_inputs hold no tensor with a batch axis")
    count = int(first.shape[0])
    dim = torch.export.Dim("batch")

    def shape_of(x: Any) -> dict[int, Any] | None:
        if not isinstance(x, Tensor):
            return None
        found: dict[int, Any] = {0: dim} if batch and x.dim() and x.shape[0] == count else {}
        if sizes:
            # Which sizes a model takes (multiples of 32, say), torch.export finds out.
            found |= dict.fromkeys(_size_axes(x), torch.export.Dim.AUTO)
        return found or None

    args, kwargs = arguments
    bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    # Found before the batch is doubled, since another axis 0 may have size 2.
    shapes = {name: replace_leaves(value, shape_of) for name, value in bound.items()}
    if batch and count == 1:
        arguments = replace_tensors(arguments, lambda x: torch.cat([x, x]) if x.dim() and len(x) == 1 else x)
    return arguments, shapes


# What the axes behind batch and channels are called, by their number.
_SIZE_NAMES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


def name_sizes(graph: Any) -> None:
    """Give the open sizes of a file's inputs names: those of the axes behind batch and channels.

    If an input has one such axis, open or fixed, its size is called ``length``; two are ``height`` and ``width``; three
    ``depth``, ``height`` and ``width``. If an earlier input has taken the name for another size, the input's own name
    stands before it, such as ``mask_height``. Sizes of inputs with more axes keep their names. The new names replace
    the old ones in the sizes of outputs and inner tensors, too: ``s77//2`` becomes ``height//2``.

    Args:
        graph: an ``onnx.GraphProto`` whose open sizes have names such as ``s77``; changed in place.
    """
    names: dict[str, str] = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        sizes = list(dims)[2:] if len(dims) in _RANKS else []
        for dim, name in zip(sizes, _SIZE_NAMES[len(sizes)] if sizes else (), strict=True):
            if dim.dim_param.isidentifier() and dim.dim_param not in names:
                taken = name in names.values()
                names[dim.dim_param] = f"{value.name}_{name}" if taken else name
    if not names:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(lambda found: names[found.group()], dim.dim_param)


def tell_fixed_batch(name: str, graph: Any) -> None:
    """Warn (UserWarning) if axis 0 of a traced graph's first input that has axes is fixed.

    Called for graphs whose batch was to be open (``dynamic_batch``): the forward then made a number of it.

    Args:
        name: that of the model's class, for the message.
        graph: an ``onnx_ir.Graph``.
    """
    first = next((value for value in graph.inputs if value.shape is not None and len(value.shape)), None)
    if first is not None and isinstance(first.shape[0], int):
        warnings.warn(
            f"the forward of {name} fixes the batch, and the file takes batches of {first.shape[0]} alone: "
            "`len(x)` and `int(x.shape[0])` do that where `x.shape[0]` does not (dynamic_batch=False if it is meant)",
            stacklevel=3,
        )


def name_keywords(traced: nn.Module, names: Iterable[str]) -> None:
    """Replace the ``**kwargs`` of a model's forward by named parameters: torch.export can give shapes to no others.

    The new parameters are keyword-only and have no default. A forward without ``**kwargs`` stays as it is.

    Args:
        traced: the model that torch.export will trace; the attribute ``forward`` of this object is replaced.
        names: those of the named arguments that the model is called with; a name that a parameter has already is left
            out.
    """
    forward = traced.forward
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    taken = names_taken(signature)
    added = [name for name in names if name not in taken]
    # ``*args`` of a forward that is called with ``args=`` got nothing: two parameters can't share a name.
    known = [one for one in parameters if one.kind is not one.VAR_KEYWORD and one.name not in added]
    known += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in added]

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    named.__signature__ = signature.replace(parameters=known)  # type: ignore[attr-defined]
    traced.forward = named


def check_sizes(model: nn.Module, arguments: Arguments) -> None:
    """Run a model, without gradient, on its example inputs with the axes behind the first two doubled.

    All these axes are doubled at once, in copies. The random state is put back, the mode stays. Tensors of other than 3
    to 5 axes stay as they are.

    Raises:
        ValueError: the forward raises an error on them, whichever.
    """
    args, kwargs = replace_tensors(arguments, _doubled)
    try:
        with torch.no_grad(), preserved_random_state(model):
            model(*args, **kwargs)
    except Exception as error:  # whatever a user's forward raises
        raise ValueError(
            f"{type(model).__name__} runs on the sizes of example_inputs alone ({error}): export it with "
            "dynamic_sizes=False"
        ) from error


def _doubled(x: Tensor) -> Tensor:
    for axis in _size_axes(x):
        x = torch.cat([x, x], axis)
    return x


def _size_axes(x: Tensor) -> range:
    return range(2, x.dim()) if x.dim() in _RANKS else range(0)
