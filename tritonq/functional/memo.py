"""Values that are computed from tensors and kept until one of the tensors changes."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import string_at
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

# Address, size in bytes and bytes of a tensor.
_Content = tuple[int, int, bytes]
_CPU = torch.device("cpu")


class Memo(Generic[T]):
    """One value, with the tensors and the key that it was made from.

    The value is made again when a tensor is another object or has been changed in place, or when the key differs.
    Averages of models often write through ``tensor.data``, which does not change the tensor's version. The contents of
    vectors and 0-d tensors on the CPU are therefore compared, too; for all others the caller puts something into the
    key that differs. ``copy.deepcopy`` and ``pickle`` give an empty Memo, so that a copy derives its own value.

    Examples:
        >>> import torch
        >>> weight, memo = torch.ones(2), Memo()
        >>> memo.get((weight,), lambda: float(weight.sum()))
        2.0
        >>> _ = weight.mul_(3)
        >>> memo.get((weight,), lambda: float(weight.sum()))
        6.0
    """

    __slots__ = ("_contents", "_key", "_tensors", "_value", "_versions")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the value."""
        self._tensors: tuple[Tensor | None, ...] | None = None
        self._versions: list[int] = []
        self._contents: list[_Content | None] = []
        self._key: Any = None
        self._value: T | None = None

    def get(self, tensors: tuple[Tensor | None, ...], make: Callable[[], T], key: Any = None) -> T:
        """Return the value that ``make`` gives for these tensors and this key.

        Args:
            tensors: what the value is made from; None for absent ones. Inference tensors have no version, so that the
                value is then made in each call.
            make: makes the value; called only if none is kept for these tensors and this key.
            key: whatever else the value depends on; compared with ``==``.
        """
        held = self._tensors
        if held is None or key != self._key or not _unchanged(tensors, held, self._versions, self._contents):
            self._value = make()
            self._tensors, self._versions, self._key = tensors, _versions(tensors), key
            self._contents = [_content_of(tensor) for tensor in tensors] if self._versions else []
        return self._value  # type: ignore[return-value]

    def __reduce__(self) -> tuple[Any, ...]:
        return (Memo, ())


def held_tensors(module: nn.Module) -> list[Tensor | None]:
    """Return the parameters and buffers of a module and its descendants, faster than torch for small modules.

    None stands for those that are registered as None, such as the bias of a layer without bias. A tensor that several
    modules share is there once for each.
    """
    found = [*module._parameters.values(), *module._buffers.values()]
    for child in module._modules.values():
        if child is not None:
            found += held_tensors(child)
    return found


def _unchanged(
    tensors: tuple[Tensor | None, ...],
    held: tuple[Tensor | None, ...],
    versions: list[int],
    contents: list[_Content | None],
) -> bool:
    if len(tensors) != len(held) or not versions:
        return False
    for tensor, before, version, content in zip(tensors, held, versions, contents, strict=True):
        if tensor is not before or (tensor is not None and tensor._version != version):
            return False
        if content is not None and tensor is not None:
            address, size, recorded = content
            if tensor.data_ptr() != address or string_at(address, size) != recorded:
                return False
    return True


def _content_of(tensor: Tensor | None) -> _Content | None:
    """Return ``(address, size, bytes)`` of a dense vector or number on the CPU; None for any other tensor.

    The bytes are what it holds now. No NumPy array is made of it: torch could not resize the tensor then.
    """
    if tensor is None or tensor.dim() > 1 or type(tensor) not in (Tensor, nn.Parameter) or tensor.device != _CPU:
        return None
    size = tensor.numel() * tensor.dtype.itemsize
    if size == 0 or not tensor.is_contiguous() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    address = tensor.data_ptr()
    return address, size, string_at(address, size)


def _versions(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """Return the version of each tensor, -1 for None; an empty list if one is an inference tensor, which has none."""
    try:
        return [-1 if tensor is None else tensor._version for tensor in tensors]
    except RuntimeError:
        return []
