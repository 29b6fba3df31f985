"""Find functions that ``torch.utils.checkpoint`` will run again in the backward, when their forward has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch.utils.checkpoint

_FILE = torch.utils.checkpoint.__file__


def is_checkpointed(frame: FrameType | None) -> bool:
    """Whether a frame of Python, or a frame that called it, runs code of ``torch.utils.checkpoint``; None: False."""
    while frame is not None:
        if frame.f_code.co_filename == _FILE:
            return True
        frame = frame.f_back
    return False


def wrap_repetitions(
    frame: FrameType | None,
    ends: Callable[[FrameType], bool],
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Wrap the functions that checkpoints will run again, in place; one that this function wrapped before stays.

    Args:
        frame: a frame of Python inside of a forward; the checkpoints that called it are searched outwards.
        ends: tells whether a frame is what called the forward; the search stops there, or where no frame is left.
        wrap: takes a function and returns a new one, which the checkpoint runs instead; it is marked by an attribute.
    """
    while frame is not None and not ends(frame):
        for holder, name in _repeated(frame):
            function = getattr(holder, name)
            if not getattr(function, _WRAPPED, False):
                wrapped = wrap(function)
                setattr(wrapped, _WRAPPED, True)
                setattr(holder, name, wrapped)
        frame = frame.f_back


_WRAPPED = "_tritonq_wrapped"


def _repeated(frame: FrameType) -> Iterator[tuple[Any, str]]:
    """Yield ``(object, attribute name)`` of each function that a checkpoint's frame keeps to run it again."""
    if frame.f_code.co_filename != _FILE:
        return
    held = frame.f_locals
    if hasattr(held.get("ctx"), "run_function"):
        yield held["ctx"], "run_function"  # use_reentrant=True
    generator = getattr(held.get("gen"), "gi_frame", None)
    if generator is not None and hasattr(generator.f_locals.get("new_frame"), "recompute_fn"):
        yield generator.f_locals["new_frame"], "recompute_fn"
