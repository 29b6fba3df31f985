"""A float tensor that is stored as codes until something reads its values.

Between the layers of a converted model values are rarely read: the next layer wants codes. A :class:`CodedTensor` has
the shape, strides and dtype of the float tensor and stores the codes alone. Operators that only move values (views,
slices, concatenations of one grid, max-pools, a plain ReLU) move its codes; every other operator, and whoever asks for
the memory, gets the values ``(code - zero_point) * scale``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from tritonq.functional.host_grid import HostGrid
from tritonq.functional.max_pool import max_pool_codes

_aten = torch.ops.aten

# Views: `x` and the result share memory.
_VIEWS = frozenset(
    {
        _aten.alias.default,
        _aten.detach.default,
        _aten.expand.default,
        _aten.permute.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.split.Tensor,
        _aten.split_with_sizes.default,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.t.default,
        _aten.transpose.int,
        _aten.unbind.int,
        _aten.unsqueeze.default,
        _aten.view.default,
    }
)
# New tensors of values of `x`.
_MOVES = frozenset(
    {
        _aten._unsafe_view.default,
        _aten.channel_shuffle.default,
        _aten.clone.default,
        _aten.flip.default,
        _aten.index.Tensor,
        _aten.index_select.default,
        _aten.pixel_shuffle.default,
        _aten.pixel_unshuffle.default,
        _aten.repeat.default,
        _aten.roll.default,
        _aten.upsample_nearest2d.default,
    }
)
# Functions of Python that reach for memory, or copy the object, past the operators.
READS_MEMORY = frozenset(
    {
        Tensor.__array__,
        Tensor.__deepcopy__,
        Tensor.__dlpack__,
        Tensor.__reduce_ex__,
        Tensor.__repr__,
        Tensor.data.__get__,  # type: ignore[attr-defined]
        Tensor.data_ptr,
        Tensor.is_shared,
        Tensor.numpy,
        Tensor.share_memory_,
        Tensor.storage,
        Tensor.tolist,
        Tensor.untyped_storage,
    }
)


class CodedTensor(Tensor):
    """A float tensor that is stored as uint8 codes, counted from 0; values are computed when something reads them.

    Shape and strides are those of the float tensor; the dtype is float32. The module's docstring says which operators
    keep the codes.

    Attributes:
        grid: of the codes: scale, the code of the value 0, the largest code, ties.
        memory_format: of the results of operators on this tensor, kept by :func:`memory_format_of`; None: not found
            out yet.
    """

    grid: HostGrid
    memory_format: torch.memory_format | None
    # What this is a view of, and how it is made from that.
    _source: CodedTensor | None
    _view: Callable[[Tensor], Tensor] | None
    _codes: Tensor
    # Once made, of a tensor that is no view.
    _float: Tensor | None
    # Whether somebody may have changed the values; of a tensor that is no view.
    _is_float: bool

    @staticmethod
    def __new__(cls, codes: Tensor, grid: HostGrid, strides: tuple[int, ...]) -> CodedTensor:
        """Make a tensor of uint8 ``codes`` on ``grid``; ``strides`` are those of the float tensor it stands for."""
        made: CodedTensor = Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=strides, dtype=torch.float32, device=codes.device
        )
        made.grid, made._codes, made._float = grid, codes, None
        made._source = made._view = None
        made._is_float, made.memory_format = False, None
        return made

    @property
    def codes(self) -> Tensor | None:
        """The uint8 codes, no copy, in any memory format; None once the values may have changed (:meth:`as_float`)."""
        return None if self._root._is_float else self._codes

    @property
    def _root(self) -> CodedTensor:
        return self if self._source is None else self._source

    def to_float(self) -> Tensor:
        """Return the values as a float32 tensor, which later calls may share: the caller must not change it."""
        root = self._root
        made = root._float is not None or root._is_float
        if self._view is not None and (made or _repeats_elements(self)):
            return self._view(root.to_float())
        if self._view is not None or self._float is None:
            values = torch.empty_strided(self.shape, self.stride(), dtype=torch.float32)
            values.copy_(self._codes)
            if self.grid.zero:
                values.sub_(self.grid.zero)
            values.mul_(self.grid.scale)
            if self._view is not None:
                return values
            self._float = values
        return self._float

    def as_float(self) -> Tensor:
        """Return the values as a float32 tensor that the caller may change or keep; the codes are not used any more.

        From now on this tensor, the one that it is a view of, and all views of that have their values in the memory of
        the returned tensor, so that they see its changes, and ``codes`` of each is None.
        """
        root = self._root
        root.to_float()
        root._is_float = True
        return self.to_float()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in READS_MEMORY:
                return func(args[0].as_float(), *args[1:], **kwargs)
            if func is F.max_pool2d and _may_pool(args[0], kwargs):
                kwargs.pop("return_indices", None)
                return coded_like(max_pool_codes(args[0]._codes, *args[1:], **kwargs), args[0])
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if func in _VIEWS and isinstance(x, CodedTensor) and x.codes is not None:
            return _viewed(x, func, args[1:], kwargs)
        if func in _MOVES and isinstance(x, CodedTensor) and x.codes is not None:
            if func is _aten._unsafe_view.default:
                # The codes may lie in another order than the values seem to.
                return coded_like(x._codes.reshape(*args[1:]), x)
            result = func(x._codes, *args[1:], **kwargs)
            if func is _aten.clone.default and kwargs.get("memory_format", torch.preserve_format) in _DENSE:
                return CodedTensor(result, x.grid, result.stride())
            return coded_like(result, x)
        if func is _aten.relu.default and isinstance(x, CodedTensor) and x.codes is not None:
            return coded_like(x.codes.clamp(min=x.grid.zero) if x.grid.zero else x.codes, x)
        if func is _aten.cat.default:
            joined = _concatenated(*args, **kwargs)
            if joined is not None:
                return joined
        return _on_values(func, args, kwargs)


_DENSE = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def coded_like(codes: Tensor, x: Tensor, grid: HostGrid | None = None) -> CodedTensor:
    """Return a CodedTensor of ``codes``: channels_last if ``x`` is and has as many axes, else contiguous.

    It is float32, whatever the dtype of ``x``.

    Args:
        codes: uint8, any memory format; stored without a copy.
        x: a float tensor or CodedTensor, of which only memory format and grid are read.
        grid: of the codes; None: the grid of ``x``, which must be a CodedTensor then.
    """
    grid = cast(CodedTensor, x).grid if grid is None else grid
    channels_last = codes.dim() == x.dim() and memory_format_of(x) is not torch.contiguous_format
    return CodedTensor(codes, grid, _dense_strides(tuple(codes.shape), channels_last))


def _repeats_elements(x: Tensor) -> bool:
    """Whether several elements of ``x`` are one element of memory, as :meth:`torch.Tensor.expand` makes them."""
    return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))


@lru_cache(maxsize=4096)
def _dense_strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Return the strides of a dense tensor of this shape, contiguous or channels_last."""
    order = [0, *range(2, len(shape)), 1] if channels_last else range(len(shape))
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of results of operators on ``x``: channels_last if ``x`` is, else contiguous.

    For five dimensions channels_last_3d takes the place of channels_last. If ``x`` is both, as with one channel, the
    result is contiguous.
    """
    if type(x) is CodedTensor:
        if x.memory_format is None:
            with torch._C.DisableTorchFunctionSubclass():
                x.memory_format = _format_of_strides(x)
        return x.memory_format
    return _format_of_strides(x)


def _format_of_strides(x: Tensor) -> torch.memory_format:
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _may_pool(x: Any, kwargs: dict[str, Any]) -> bool:
    return isinstance(x, CodedTensor) and x.codes is not None and x.numel() > 0 and not kwargs.get("return_indices")


def _viewed(x: CodedTensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply a view operator to shape, strides and codes of ``x``; return a CodedTensor that views it, or a list.

    ``func`` is the operator, called with ``x`` and then ``rest`` and ``kwargs``.
    """
    shape = func(torch.empty_strided(x.shape, x.stride(), device="meta"), *rest, **kwargs)
    if func is _aten.view.default:
        # The codes may lie in another order than the values seem to.
        codes: Any = x._codes.reshape(shape.shape)
    else:
        codes = func(x._codes, *rest, **kwargs)
    if isinstance(shape, Tensor):
        return _view_of(x, codes, shape, lambda values: func(values, *rest, **kwargs))
    return [
        _view_of(x, part, like, partial(_part, lambda values: func(values, *rest, **kwargs), index))
        for index, (part, like) in enumerate(zip(codes, shape, strict=True))
    ]


def _view_of(x: CodedTensor, codes: Tensor, like: Tensor, view: Callable[[Tensor], Tensor]) -> CodedTensor:
    made = CodedTensor(codes, x.grid, like.stride())
    made._source = x._root
    inner = x._view
    made._view = view if inner is None else partial(_both, inner, view)
    return made


def _part(split: Callable[[Tensor], Any], index: int, values: Tensor) -> Tensor:
    return cast(Tensor, split(values)[index])


def _both(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return second(first(values))


def _concatenated(tensors: Any, dim: int = 0) -> CodedTensor | None:
    """Concatenate tensors of codes on one grid along ``dim``; None if one is no CodedTensor or has another grid."""
    first = tensors[0]
    if not all(isinstance(x, CodedTensor) and x.codes is not None and x.grid == first.grid for x in tensors):
        return None
    return coded_like(torch.cat([x._codes for x in tensors], dim), first)


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator ``func`` on arguments in which float tensors take the place of CodedTensors; return its result.

    If it writes to its arguments or returns their memory, their codes are dropped. If it writes to its first argument
    and returns that, the result is the given tensor itself.
    """
    schema = func._schema
    shares = any(result.alias_info is not None for result in schema.returns)
    lends = schema.is_mutable or shares

    def plain(item: Any) -> Any:
        if not isinstance(item, CodedTensor):
            return item
        return item.as_float() if lends else item.to_float()

    result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    if schema.is_mutable and len(schema.returns) == 1 and args and isinstance(args[0], CodedTensor):
        written = schema.arguments[0].alias_info
        if written is not None and written.is_write and shares:
            return args[0]
    return result
