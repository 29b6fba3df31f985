"""A mode that watches the calls of one forward, and rests while a layer inside computes, with its hundreds of calls."""

from __future__ import annotations

from types import TracebackType

from torch._C import (
    _get_function_stack_at,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode


class ForwardMode(TorchFunctionMode):
    """A ``TorchFunctionMode`` that has nothing to do for calls of modules inside the forward that it watches."""


class RestingModes:
    """Take the innermost modes off while they are :class:`ForwardMode`, and put them back at the end of the block."""

    __slots__ = ("_modes",)

    def __enter__(self) -> None:
        self._modes: list[ForwardMode] = []
        while depth := _len_torch_function_stack():
            mode = _get_function_stack_at(depth - 1)
            if not isinstance(mode, ForwardMode):
                break
            self._modes.append(mode)
            _pop_torch_function_stack()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            _push_on_torch_function_stack(mode)
