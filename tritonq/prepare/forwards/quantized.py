"""Let a forward quantize its arguments and results with quantizers that are children of its module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import Tensor, nn

from tritonq.nn.own_input import quantize_read
from tritonq.prepare.record.structure import Path, replace_at


@dataclass(frozen=True)
class Read:
    """One argument of a forward that is quantized before the forward begins.

    Attributes:
        child: name of the quantizer below the module, with dots for deeper ones.
        position: index among the positional arguments, without self; None if it is passed by name only.
        name: name of the parameter; None if it is passed by position only. A call that gives this name is looked up
            by it, any other by ``position``.
        path: keys that lead from the argument to the tensor, such as ``(0, "mask")``; empty if it is the tensor.
        observes: whether the quantizer observes the tensor here in training. If several modules read one tensor with
            one quantizer, only one of them observes.
    """

    child: str
    position: int | None = 0
    name: str | None = None
    path: Path = ()
    observes: bool = True

    def quantized(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` of a call of ``module``'s forward with this argument quantized.

        Both keep their contents if the argument was not given or is no floating-point tensor. The
        returned dict is always a new one, and containers on the way to the tensor are copied.

        Raises:
            TypeError: ``path`` leads into something that is no tuple, list or plain dict.
        """
        quantizer = reduce(getattr, self.child.split("."), module)

        def change(item: Any) -> Any:
            return _quantized(item, quantizer, self.observes)

        if self.name is not None and self.name in kwargs:
            return args, {**kwargs, self.name: replace_at(kwargs[self.name], self.path, change)}
        if self.position is not None and self.position < len(args):
            return replace_at(args, (self.position, *self.path), change), dict(kwargs)
        return args, dict(kwargs)

    def to_data(self) -> list[Any]:
        """Return the attributes in their order as a list, which JSON can hold."""
        return [self.child, self.position, self.name, list(self.path), self.observes]

    @classmethod
    def from_data(cls, data: Any) -> Read:
        """Return the object whose attributes are the items of the list ``data``, in their order.

        Raises:
            ValueError: ``data`` is no list of five items with the types of the attributes (``path`` as a list).
        """
        kinds: tuple[Any, ...] = (str, (int, type(None)), (str, type(None)), list, bool)
        fits = isinstance(data, list) and len(data) == len(kinds)
        if not fits or not all(isinstance(item, kind) for item, kind in zip(data, kinds, strict=True)):
            raise ValueError(f"not an argument to quantize: {data!r}")
        child, position, name, path, observes = data
        return cls(child, position, name, tuple(path), observes)


def quantizing(inner: Callable[..., Any], reads: Iterable[Read], returns: str | None) -> Callable[..., Any]:
    """Return a forward that quantizes arguments, runs ``inner`` on them, and quantizes the result.

    Args:
        inner: the forward, called with the module first, as the returned one is.
        reads: the arguments to quantize; those that a call does not give are skipped.
        returns: name of the child that quantizes the result and observes it in training; None: no child does. A
            result that is no floating-point tensor, such as a tuple, is returned as it is.
    """
    places = tuple(reads)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for read in places:
            args, kwargs = read.quantized(self, args, kwargs)
        result = inner(self, *args, **kwargs)
        return result if returns is None else _quantized(result, getattr(self, returns), True)

    return forward


def _quantized(item: Any, quantizer: nn.Module, observes: bool) -> Any:
    """Return an item quantized if it is a floating-point tensor, else as it is.

    Without ``observes`` the quantizer's range is not updated.
    """
    if not isinstance(item, Tensor) or not item.is_floating_point():
        return item
    return quantize_read(quantizer, item, observes)
