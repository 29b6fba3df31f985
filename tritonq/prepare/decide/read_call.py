"""What a recorded call of a function of one tensor computes, by the arguments that it was given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

from tritonq.prepare.record.dataflow import Call

Operation = TypeVar("Operation")


def read_call(call: Call, readers: Mapping[str, Callable[..., Operation]], name: str | None = None) -> Operation | None:
    """Return the operation that a reader finds in a call's arguments; ``name`` chooses the reader, or the call's name.

    None where there is no such reader, where the call reads more tensors than one, and where the reader does not take
    these arguments: it raises TypeError or ValueError then.
    """
    reader = readers.get(call.name if name is None else name)
    if reader is None or len(call.inputs) != 1:
        return None
    try:
        bound = inspect.signature(reader).bind(*call.args, **call.kwargs)
        return reader(*bound.args, **bound.kwargs)
    except (TypeError, ValueError):
        return None
