"""Functions inside of a forward that ``torch.utils.checkpoint`` runs again in the backward, outside of the forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch.utils.checkpoint

_FILE = torch.utils.checkpoint.__file__


def is_checkpointed(frame: FrameType | None) -> bool:
    """Whether a frame, or one that called it, is that of ``torch.utils.checkpoint``."""
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
    """Wrap the functions that checkpoints between a frame and a forward will run again, each once.

    Args:
        frame: a frame inside of the forward.
        ends: whether a frame is what called the forward.
        wrap: makes the function that runs instead.
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
    """Yield where a frame of ``torch.utils.checkpoint`` keeps the function that it will run again."""
    if frame.f_code.co_filename != _FILE:
        return
    held = frame.f_locals
    if hasattr(held.get("ctx"), "run_function"):
        yield held["ctx"], "run_function"  # use_reentrant=True
    generator = getattr(held.get("gen"), "gi_frame", None)
    if generator is not None and hasattr(generator.f_locals.get("new_frame"), "recompute_fn"):
        yield generator.f_locals["new_frame"], "recompute_fn"
