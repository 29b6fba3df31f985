"""Values that are derived from tensors and kept until one of the tensors changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Memo(Generic[T]):
    """One value, with the tensors and the key that it was made from.

    The value is made again when a tensor is another object or has been changed in place, or when the key differs. A
    change through ``tensor.data`` leaves no trace in the tensor's version: who allows for it puts a number that tells
    the change into the key. ``copy.deepcopy`` and ``pickle`` give an empty Memo, so that a copy derives its own value.

    Examples:
        >>> import torch
        >>> weight, memo = torch.ones(2), Memo()
        >>> memo.get((weight,), lambda: float(weight.sum()))
        2.0
        >>> _ = weight.mul_(3)
        >>> memo.get((weight,), lambda: float(weight.sum()))
        6.0
    """

    __slots__ = ("_key", "_tensors", "_value", "_versions")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the value."""
        self._tensors: tuple[Tensor | None, ...] | None = None
        self._versions: list[int] = []
        self._key: Any = None
        self._value: T | None = None

    def get(self, tensors: tuple[Tensor | None, ...], make: Callable[[], T], key: Any = None) -> T:
        """Return the value that ``make`` gives for these tensors and this key.

        Args:
            tensors: what the value is made from; None for absent ones. Inference tensors have no version, so that the
                value is then made in each call.
            make: makes the value.
            key: whatever else the value depends on; compared with ``==``.
        """
        versions = _versions(tensors)
        held = self._tensors
        if (
            held is None
            or versions is None
            or versions != self._versions
            or key != self._key
            or len(held) != len(tensors)
            or any(one is not other for one, other in zip(held, tensors, strict=True))
        ):
            self._value = make()
            self._tensors, self._versions, self._key = tensors, versions or [], key
        return self._value  # type: ignore[return-value]

    def __reduce__(self) -> tuple[Any, ...]:
        return (Memo, ())


def held_tensors(module: nn.Module) -> list[Tensor | None]:
    """Return the parameters and buffers of a module and its descendants, where these are few and asked for often."""
    found = [*module._parameters.values(), *module._buffers.values()]
    for child in module._modules.values():
        if child is not None:
            found += held_tensors(child)
    return found


def _versions(tensors: tuple[Tensor | None, ...]) -> list[int] | None:
    try:
        return [-1 if tensor is None else tensor._version for tensor in tensors]
    except RuntimeError:  # an inference tensor
        return None
