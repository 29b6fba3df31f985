"""Read from the arguments of a recorded call what it computes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

from tritonq.prepare.record.dataflow import Call

Operation = TypeVar("Operation")


def read_call(call: Call, readers: Mapping[str, Callable[..., Operation]], name: str | None = None) -> Operation | None:
    """Return the operation that a call of a function of one tensor computes; None if no reader takes the call.

    A reader is a function with the parameters of a torch function, which returns the operation in the form that the
    caller wants, such as a `Clipping`. It gets the recorded arguments, in which a ``Ref`` stands for the tensor. It
    raises TypeError or ValueError for arguments that it can't take. A call that reads more than one tensor has no
    operation.

    Args:
        call: any recorded call.
        readers: a reader for each name of an operation, such as ``"clamp"``.
        name: the name in ``readers``; None: the call's name.
    """
    reader = readers.get(call.name if name is None else name)
    if reader is None or len(call.inputs) != 1:
        return None
    try:
        bound = inspect.signature(reader).bind(*call.args, **call.kwargs)
        return reader(*bound.args, **bound.kwargs)
    except (TypeError, ValueError):
        return None
