"""A torch function mode for the calls of one forward, and a way to switch it off while a layer inside computes.

A *torch function mode* (``torch.overrides.TorchFunctionMode``) is called in place of each torch function. A layer makes
hundreds of calls that do not concern the mode.
"""

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
    """Base of torch function modes that are called for the torch functions of one forward.

    Each `QATLayer` (convolution, linear layer) switches them off while it computes (:class:`RestingModes`), so that a
    mode does not see the layer's own calls.
    """


class RestingModes:
    """Context manager that switches off each :class:`ForwardMode` at the top of torch's stack of function modes.

    It removes them, from the top down to the first mode of another class, and puts them back, in order, when the block
    ends. Those below a mode of another class stay on.
    """

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
