"""The float values of a layer with integer weights, as users' code reads them: computed when something reads them.

A forward may read ``layer.weight.dtype`` in each call; the answer must be float32 and should cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tritonq.functional.coded_tensor import READS_MEMORY


def stored(module: nn.Module, name: str) -> Tensor | None:
    """Return the parameter or buffer registered as ``name``, although the module's class has a property of that name.

    None if it is registered as None, such as the bias of a layer without one.

    Raises:
        AttributeError: the module has neither a parameter nor a buffer of this name.
    """
    if name in module._buffers:
        return module._buffers[name]
    if name in module._parameters:
        return module._parameters[name]
    raise AttributeError(f"{type(module).__name__} has no {name}")


def lazy_values(codes: Tensor, make: Callable[[], Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of ``dtype``, with shape and device of ``codes``, that stands for the one that ``make`` returns.

    ``make`` returns values of that dtype and shape; each operator that reads them calls it anew. While torch.compile,
    torch.export or torch.jit traces, it is called at once and its result returned: what is unused disappears from the
    graph.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return make()
    return LazyValues(codes, make, dtype)


class LazyValues(Tensor):
    """A read-only tensor of floats whose values are computed for each operator that reads them.

    Shape, dtype and device are known without computing. An operator that would change it raises RuntimeError; views of
    it are read-only, too.

    Args:
        codes: a tensor that gives shape, strides and device.
        make: called without arguments by each operator that reads the values; returns them, shaped as ``codes``.
        dtype: of what ``make`` returns, and so of this tensor.
    """

    _make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, codes: Tensor, make: Callable[[], Tensor], dtype: torch.dtype) -> LazyValues:
        """Make a tensor of ``dtype`` that stands for the result of ``make``, shaped and laid out as ``codes``."""
        made: LazyValues = Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device
        )
        made._make = make
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()  # so that who writes there is told
        with torch._C.DisableTorchFunctionSubclass():
            if func in READS_MEMORY:
                args = (args[0]._make(), *args[1:])
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable and _is_written(func._schema, args, kwargs or {}):
            raise RuntimeError(
                f"{func} would change the weight of a converted layer, which is fixed: change the model that it was "
                "converted from, and convert that"
            )
        result = func(*_made(args), **_made(kwargs or {}))
        is_view = not func._schema.is_mutable and any(each.alias_info is not None for each in func._schema.returns)
        return tree_map(_read_only, result) if is_view else result


def _is_written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator writes to lazy values, as one of its arguments or in a list of tensors."""
    given = zip_longest(schema.arguments, args)
    written = [
        kwargs.get(argument.name, value)
        for argument, value in given
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return any(isinstance(leaf, LazyValues) for leaf in tree_leaves(written))


def _read_only(item: Any) -> Any:
    """Return a view as read-only values, since writes to it would reach no layer; anything but a tensor as it is."""
    return LazyValues(item, lambda: item, item.dtype) if isinstance(item, Tensor) else item


def _made(item: Any) -> Any:
    return tree_map(lambda leaf: cast(Any, leaf)._make() if isinstance(leaf, LazyValues) else leaf, item)


def check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    """Raise ValueError, with ``name`` in its message, unless ``tensor`` is None or has the shape ``expected``."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have the shape {expected}, got {tuple(tensor.shape)}")
