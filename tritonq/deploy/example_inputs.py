"""The batch axis in the example inputs of the exporters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritonq.prepare.record.example import Arguments
from tritonq.prepare.record.structure import replace_tensors, tensors_in


def open_batch(arguments: Arguments) -> tuple[Arguments, Any]:
    """Arguments to trace with, and their ``dynamic_shapes``: axis 0 open where it is as long as the first tensor's.

    A batch of one is doubled, since torch.export takes an example of size 1 for a constant.

    Raises:
        ValueError: no tensor has a batch axis.
    """
    first = next((tensor for _, tensor in tensors_in(arguments) if tensor.dim()), None)
    if first is None:
        raise ValueError("example_inputs hold no tensor with a batch axis")
    batch = int(first.shape[0])
    if batch == 1:
        arguments = replace_tensors(arguments, lambda x: torch.cat([x, x]) if x.dim() and len(x) == 1 else x)
        batch = 2
    dim = torch.export.Dim("batch")

    def shape_of(x: Tensor) -> dict[int, Any] | None:
        return {0: dim} if x.dim() and x.shape[0] == batch else None

    positional, named = _shapes(arguments, shape_of)
    return arguments, named if named and not positional else positional


def _shapes(item: Any, shape_of: Callable[[Tensor], Any]) -> Any:
    """The structure of arguments with a shape for each tensor, and None for all that isn't one."""
    if isinstance(item, Tensor):
        return shape_of(item)
    if isinstance(item, (tuple, list)):
        return type(item)(_shapes(child, shape_of) for child in item)
    if isinstance(item, dict):
        return {key: _shapes(child, shape_of) for key, child in item.items()}
    return None
