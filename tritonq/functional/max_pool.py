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
        codes: uint8 (n, c, h, w) or (c, h, w); any memory format.
        kernel_size: height and width of a window: a list of two, or one number for both.
        stride: distance of windows, a list of two or one number; None or an empty list or tuple: the kernel's size.
        padding: rows and columns of code 0, the smallest code, added on each side; a list of two or one number.
        dilation: distance of the elements of a window, a list of two or one number.
        ceil_mode: whether a last window may reach beyond the padded input.

    Returns:
        uint8 (..., h', w') with the sizes that torch's pool gives; for a window of one element a view of ``codes``.

    Raises:
        RuntimeError: sizes, or a number of axes, that torch refuses, such as a padding of more than half of the window;
            the message is torch's.
    """
    stride = kernel_size if stride in (None, [], ()) else stride
    pairs = [_pair(value) for value in (kernel_size, stride, padding, dilation)]
    sizes = tuple(zip(*pairs, strict=False))
    is_plain = codes.dim() in (3, 4) and all(len(pair) == 2 for pair in pairs)
    if not (is_plain and all(map(_fits, codes.shape[-2:], sizes))):
        # Rare: torch's own pool says whether these sizes are allowed. On the meta device it has no other work.
        empty = torch.empty(codes.shape, device="meta")
        F.max_pool2d(empty, kernel_size, stride, padding, dilation, ceil_mode)
    for axis, (size, step, pad, spread) in enumerate(sizes):
        codes = _along(codes, axis - 2, size, step, pad, spread, ceil_mode)
    return codes


def _pair(value: int | list[int]) -> tuple[int, ...]:
    """Return height and width; what torch refuses may have another length."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _fits(length: int, sizes: tuple[int, ...]) -> bool:
    """Whether a window fits into an axis of the input, and has at most half of its size as padding."""
    size, step, pad, spread = sizes
    return min(size, step, spread) > 0 <= pad <= size // 2 and spread * (size - 1) < length + 2 * pad


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
