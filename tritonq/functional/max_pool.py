"""Max-pools of tensors of uint8 codes."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor


def max_pool_codes(
    codes: Tensor,
    kernel_size: int | list[int],
    stride: int | list[int] | None = None,
    padding: int | list[int] = 0,
    dilation: int | list[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Return the max-pool of codes, as ``F.max_pool2d`` pools values; one axis after the other, whole slices at a time.

    torch's own pool of uint8 tensors goes element by element.

    Args:
        codes: uint8 (..., h, w); any memory format.
        kernel_size: as in torch, as are the others.
        stride: None: that of the kernel.
        padding: added on each side, as code 0, the smallest code.
        dilation: between elements of a window.
        ceil_mode: whether a last window may reach beyond the padded input.
    """
    stride = kernel_size if stride is None or stride == [] else stride
    for axis in (0, 1):
        size, step, pad, spread = (_entry(value, axis) for value in (kernel_size, stride, padding, dilation))
        codes = _along(codes, axis - 2, size, step, pad, spread, ceil_mode)
    return codes


def _entry(value: int | list[int], axis: int) -> int:
    if isinstance(value, int):
        return value
    return value[axis] if len(value) == 2 else value[0]


def _along(codes: Tensor, axis: int, size: int, step: int, pad: int, spread: int, ceil_mode: bool) -> Tensor:
    length = codes.shape[axis]
    span = length + 2 * pad - spread * (size - 1) - 1
    count = (-(-span // step) if ceil_mode else span // step) + 1
    if ceil_mode and (count - 1) * step >= length + pad:
        count -= 1  # the last window has to begin inside of the input or of the padding before it
    # Of each place in the window: the first result whose window has that place inside of the input, and the one behind
    # the last; what lies outside never counts.
    starts = [index * spread - pad for index in range(size)]
    spans = [(max(0, -(start // step)), min(count, (length - 1 - start) // step + 1)) for start in starts]
    whole = [index for index, span in enumerate(spans) if span == (0, count)]
    if not whole:
        after = max(0, (count - 1) * step + spread * (size - 1) + 1 - length - pad)
        padded = F.pad(codes, (pad, after) if axis == -1 else (0, 0, pad, after))
        return _along(padded, axis, size, step, 0, spread, False)
    if size == 1:
        return _every(codes, axis, starts[0], step, count)
    result = None
    for index in sorted(range(size), key=lambda index: index not in whole):
        first, end = spans[index]
        if end <= first:
            continue
        part = _every(codes, axis, starts[index] + first * step, step, end - first)
        if result is None:
            result = part.clone()
        else:
            inner = result.narrow(axis, first, end - first)
            torch.maximum(inner, part, out=inner)
    return cast(Tensor, result)


def _every(codes: Tensor, axis: int, start: int, step: int, count: int) -> Tensor:
    """Return ``count`` slices along an axis (-1 or -2) from ``start`` on, each ``step`` behind the one before it."""
    window = slice(start, start + (count - 1) * step + 1, step)
    return codes[..., window] if axis == -1 else codes[..., window, :]
