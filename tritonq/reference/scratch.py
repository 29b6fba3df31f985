"""Memory that operators on the CPU use for temporaries again and again.

The system hands out a large tensor's memory page by page, at its first write. On a CPU that takes several times as long
as the arithmetic that fills it. A temporary that is not needed after its operator returns is therefore written to
memory that is kept. A *slot* is one such memory, by its purpose.
"""

from __future__ import annotations

import threading
from typing import Literal

import torch
from torch import Tensor, nn

# One slot per role, so that what is alive at the same time never shares one: a quantized weight; the gradient of a
# convolution's output; a convolution's input, rebuilt; and two that a single function of `tritonq.reference` needs.
Slot = Literal["weight", "gradient", "input", "local", "product"]

# Below this, memory that was freed a moment ago serves the next request anyhow.
_LEAST_BYTES = 1 << 19
# What is larger is not kept from step to step: other parts of the program may need it in between.
_MOST_BYTES = 1 << 28


class _Slots(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[Slot, torch.dtype], Tensor] = {}


_slots = _Slots()


def borrow(slot: Slot, like: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return uninitialised memory for a tensor of ``like``'s shape and strides, or None if new memory is as good.

    Its contents last until the next call for the same slot and dtype in this thread. A slot keeps, per dtype,
    the size of its largest request until the thread ends. The result is None for memory below 512 KiB or above 256 MiB,
    if ``like`` is not dense or no plain tensor or parameter on a CPU, and while a graph is traced.

    Args:
        slot: name of the purpose, such as ``"local"``; what is in use at the same time needs different slots.
        like: a tensor.
        dtype: of the memory; None: ``like``'s.
    """
    if not like.is_cpu or type(like) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return None
    dtype = like.dtype if dtype is None else dtype
    count = like.numel()
    if not _LEAST_BYTES <= count * dtype.itemsize <= _MOST_BYTES or not is_dense(like):
        return None
    buffer = _slots.buffers.get((slot, dtype))
    if buffer is None or buffer.numel() < count:
        # Not of inference mode, even if that is on: the next call may come outside of it.
        with torch.inference_mode(False):
            buffer = _slots.buffers[slot, dtype] = torch.empty(count, dtype=dtype)
    return buffer.as_strided(like.shape, like.stride())


def borrow_or_new(slot: Slot, like: Tensor) -> Tensor:
    """Return uninitialised memory like ``like``: the slot's (:func:`borrow`), or a new tensor if that gives None."""
    borrowed = borrow(slot, like)
    return torch.empty_like(like) if borrowed is None else borrowed


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` is contiguous or channels last (``channels_last`` in 4 dimensions, ``channels_last_3d`` in 5)."""
    if x.is_contiguous():
        return True
    if x.dim() not in (4, 5):
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def in_memory_order(x: Tensor) -> Tensor:
    """Return the elements of a dense tensor as a vector, in the order in which they lie in memory; a view."""
    return x.as_strided((x.numel(),), (1,))
