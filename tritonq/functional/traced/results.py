"""Results of operators as the plain tensors that ``torch.library`` returns, and back.

A *template* describes a result: it is nested as the result is, and has, in place of tensors and grids, *leaves* that
say how they look: :class:`~tritonq.reference.operator.Like`, :class:`~tritonq.reference.operator.New` or
:class:`~tritonq.reference.operator.CopyOf`. A grid is returned as three tensors: scale, zero point, switch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tritonq.grid import Grid
from tritonq.reference.operator import CopyOf, Given, Like, New

# A grid is returned as scale, zero point and switch; empty tensors stand for what it has not.
_GRID_TENSORS = 3


def schema(template: Any) -> str:
    """Return the results of a template as a schema spells them: ``"Tensor"``, or ``"(Tensor, Tensor)"`` for two.

    A grid counts as three tensors, and what is no leaf (an argument as a result, a constant) as none; without leaves it
    is ``"()"``.
    """
    count = sum(_GRID_TENSORS if isinstance(leaf, CopyOf) else 1 for leaf in _leaves(template))
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def pack(tensors: list[Tensor]) -> Any:
    """Return a list of tensors as an operator returns it: None if empty, one tensor as it is, else a tuple."""
    if not tensors:
        return None
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def prototypes(template: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """Return uninitialised tensors with the shapes, dtypes, strides and devices that the results will have.

    Args:
        template: of the result; each leaf gives one tensor, a grid three.
        arguments: values of the operator's arguments, by name.
    """
    found: list[Tensor] = []
    for leaf in _leaves(template):
        if isinstance(leaf, CopyOf):
            found.extend(_empty_grid(leaf, arguments))
        elif isinstance(leaf, Like):
            like = _like(leaf, arguments)
            found.append(torch.empty_like(like, dtype=_dtype(leaf, like, arguments)))
        else:
            source = lookup(leaf.argument, arguments)
            shape = tuple(leaf.shape(arguments))
            made = source.new_empty(shape, dtype=_dtype(leaf, source, arguments))
            found.append(made.contiguous(memory_format=_format(leaf, source, len(shape))))
    return found


def separate_tensors(template: Any, result: Any, arguments: dict[str, Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors of ``result`` with the strides of :func:`prototypes`, copied if they share memory.

    torch forbids results that share memory with inputs or with each other. A tensor with other strides is copied, too,
    and so is every grid. A grid's switch is bool, True for a grid without one; without a zero point that is an empty
    tensor. None in place of a grid gives empty tensors for scale and zero point, and an uninitialised switch.

    Args:
        template: of the result.
        result: what the implementation returned, nested as ``template``.
        arguments: values of the operator's arguments, by name.
        inputs: all tensors among the operator's plain arguments.
    """
    taken = {_memory(tensor) for tensor in inputs}
    found: list[Tensor] = []
    for leaf, value in zip(_leaves(template), _values(template, result), strict=True):
        if isinstance(leaf, CopyOf):
            empty = _empty_grid(leaf, arguments)
            if value is not None:
                _copy_grid(value, *empty)
            found.extend(empty)
            continue
        if isinstance(leaf, Like):
            expected = torch.empty_like(_like(leaf, arguments), device="meta").stride()
        else:
            layout = _format(leaf, lookup(leaf.argument, arguments), value.dim())
            expected = torch.empty(value.shape, device="meta", memory_format=layout).stride()
        if value.stride() != expected or _memory(value) in taken:
            value = torch.empty_strided(value.shape, expected, dtype=value.dtype, device=value.device).copy_(value)
        # Results must not share memory with each other either.
        taken.add(_memory(value))
        found.append(value)
    return found


def _memory(tensor: Tensor) -> int:
    """Return a number that is equal for tensors that share memory; works for traced tensors, too."""
    address: int = tensor.untyped_storage()._cdata
    return address


def restore(template: Any, arguments: dict[str, Any], outputs: Any) -> Any:
    """Return the result nested as the reference returns it, from the tensors that the operator returned.

    Args:
        template: of the result. Besides leaves it may hold :class:`~tritonq.reference.operator.Given` for an argument,
            and other values, such as True, which are results as they are.
        arguments: values of the operator's arguments, by name. A ``Given`` becomes the argument that it names. A
            ``CopyOf`` becomes a grid with the type of the grid argument that it names, and without a zero point if
            that grid has none; None if that argument is None.
        outputs: a tensor, or a sequence of tensors in the order of the leaves; None: the result is None.
    """
    if outputs is None:
        return None
    tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return _restore(template, arguments, tensors)


def lookup(name: str, arguments: dict[str, Any]) -> Any:
    """Return the argument called ``name``, or an attribute of one, such as ``"grid.scale"``.

    ``arguments`` holds the values of the operator's arguments by name. An argument whose attribute is asked for must
    not be None.
    """
    first, *fields = name.split(".")
    return reduce(getattr, fields, arguments[first])


def _dtype(leaf: Like | New, source: Tensor, arguments: dict[str, Any]) -> torch.dtype:
    """Return the dtype of a result: the leaf's, that of the argument it names, or that of ``source``."""
    dtype: Any = arguments[leaf.dtype] if isinstance(leaf.dtype, str) else leaf.dtype
    if dtype is None:
        return source.dtype
    if isinstance(dtype, Tensor):
        return dtype.dtype
    return dtype if isinstance(dtype, torch.dtype) else dtype(source.dtype)


def _format(leaf: New, source: Tensor, dimensions: int) -> torch.memory_format:
    """Return the memory format of a new result with so many ``dimensions``: that of ``source`` if the leaf keeps it."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(dimensions, torch.contiguous_format)
    keeps = leaf.keeps_format and source.dim() == dimensions and not source.is_contiguous()
    return last if keeps and source.is_contiguous(memory_format=last) else torch.contiguous_format


def _like(leaf: Like, arguments: dict[str, Any]) -> Tensor:
    value: Tensor = lookup(leaf.argument, arguments)
    return value if leaf.prepare is None else leaf.prepare(value)


def _leaves(template: Any) -> Iterator[Like | New | CopyOf]:
    if isinstance(template, (Like, New, CopyOf)):
        yield template
    elif isinstance(template, tuple):
        for each in template:
            yield from _leaves(each)


def _values(template: Any, result: Any) -> Iterator[Any]:
    """Yield the parts of ``result`` that the leaves of the template describe, in their order."""
    if isinstance(template, (Like, New, CopyOf)):
        yield result
    elif isinstance(template, tuple):
        for each, value in zip(template, result, strict=True):
            yield from _values(each, value)


def _restore(template: Any, arguments: dict[str, Any], tensors: list[Tensor]) -> Any:
    """Return the result of a template; takes its tensors off the front of ``tensors``."""
    if isinstance(template, CopyOf):
        scale, zero_point, enabled = tensors.pop(0), tensors.pop(0), tensors.pop(0)
        grid = arguments[template.argument]
        if grid is None:
            return None
        return Grid(scale, None if grid.zero_point is None else zero_point, grid.qtype, enabled)
    if isinstance(template, (Like, New)):
        return tensors.pop(0)
    if isinstance(template, Given):
        return arguments[template.argument]
    if not isinstance(template, tuple):
        return template
    parts = [_restore(each, arguments, tensors) for each in template]
    return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)


def _empty_grid(leaf: CopyOf, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    grid: Grid | None = arguments[leaf.argument]
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    given = None if leaf.shape is None else leaf.shape(arguments)
    shape = (0,) if grid is None else given or tuple(grid.scale.shape)
    has_zero_point = grid is not None and grid.zero_point is not None
    return (
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape if has_zero_point else (0,), dtype=torch.int32, device=device),
        torch.empty(given or (1,), dtype=torch.bool, device=device),
    )


def _copy_grid(grid: Grid, scale: Tensor, zero_point: Tensor, enabled: Tensor) -> None:
    scale.copy_(grid.scale)
    enabled.copy_(torch.ones_like(enabled) if grid.enabled is None else grid.enabled)
    if grid.zero_point is not None:
        zero_point.copy_(grid.zero_point)
