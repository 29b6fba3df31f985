"""Values that are computed from tensors and kept until one of the tensors changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Memo(Generic[T]):
    """One value, with the tensors and the key that it was made from.

    The value is made again when a tensor is another object or has been changed in place, or when the key differs. A
    change through ``tensor.data`` does not change the tensor's version: to notice it, the caller puts something into
    the key that differs. ``copy.deepcopy`` and ``pickle`` give an empty Memo, so that a copy derives its own value.

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
        held = self._tensors
        if held is None or key != self._key or not _unchanged(tensors, held, self._versions):
            self._value = make()
            self._tensors, self._versions, self._key = tensors, _versions(tensors), key
        return self._value  # type: ignore[return-value]

    def __reduce__(self) -> tuple[Any, ...]:
        return (Memo, ())


def held_tensors(module: nn.Module) -> list[Tensor | None]:
    """Return the parameters and buffers of a module and its descendants, faster than torch for small modules.

    None stands for those that are registered as None, such as the bias of a layer without bias.
    """
    found = [*module._parameters.values(), *module._buffers.values()]
    for child in module._modules.values():
        if child is not None:
            found += held_tensors(child)
    return found


def _unchanged(tensors: tuple[Tensor | None, ...], held: tuple[Tensor | None, ...], versions: list[int]) -> bool:
    if len(tensors) != len(held) or not versions:
        return False
    for index, tensor in enumerate(tensors):
        if tensor is not held[index] or (tensor is not None and tensor._version != versions[index]):
            return False
    return True


def _versions(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """Return the version of each tensor, -1 for None; an empty list if one is an inference tensor, which has none."""
    try:
        return [-1 if tensor is None else tensor._version for tensor in tensors]
    except RuntimeError:
        return []
