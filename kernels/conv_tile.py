"""Tiles, geometry and output memory that the kernels of convolutions share.

A convolution is computed as an implicit matrix product: (pixels, in channels × taps) by (in channels × taps, out
channels). A *tap* is one position of the kernel window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

# Steps in flight keep their operands in shared memory, which no GPU has enough of for more.
MAX_STAGES = 8


class ConvTile(NamedTuple):
    """What one program works on: pixels × out channels, in steps of ``channels``.

    Attributes:
        pixels: output pixels, a power of two.
        outs: out channels, a power of two.
        channels: in channels that one step of the sum adds, a power of two.
        warps: warps of the program, Triton's ``num_warps``, a power of two.
        stages: steps whose operands are being loaded at a time, Triton's ``num_stages``.
    """

    pixels: int
    outs: int
    channels: int
    warps: int
    stages: int


class ConvGeometry(NamedTuple):
    """Geometry of a 2-d convolution: pairs (vertical, horizontal) and the number of groups.

    Attributes:
        stride: distance of the input places of neighbouring outputs.
        padding: zeros on each side.
        dilation: distance of the taps.
        groups: groups of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def output_shape(x: Sequence[int], weight: Sequence[int], geometry: ConvGeometry) -> tuple[int, ...]:
    """Return the shape (n, out, h', w') of a convolution's output, from the shapes of its input and weight.

    ``size = (in + 2 padding - dilation (kernel - 1) - 1) // stride + 1`` for height and width; 0 or less, unchecked, if
    the padded input is smaller than the kernel.
    """
    sizes = (
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(x[2:], weight[2:], *geometry[:3], strict=True)
    )
    return (x[0], weight[0], *sizes)


def empty_output(x: Tensor, weight: Tensor, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """Return uninitialised memory for a convolution's output, on the device of ``x``; channels_last if ``x`` is.

    Its shape is that of :func:`output_shape`.

    Args:
        x: the input, (n, c, h, w).
        weight: (out, c/groups, kh, kw).
        geometry: of the convolution.
        dtype: of the output.
    """
    return torch.empty(
        output_shape(x.shape, weight.shape, geometry),
        dtype=dtype,
        device=x.device,
        memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format,
    )


def reach(x: Tensor) -> int:
    """Return one past the largest offset in a non-empty ``x``, for `is_wide`: ``1 + Σ (size - 1) stride`` elements."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` is channels_last but not contiguous; False with one channel or one pixel, where it is both."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def conv_tile(
    pixels: int,
    outs: int,
    channels: int,
    *,
    depthwise: bool = False,
    widest: int = 128,
    steps: tuple[int, ...] = (32, 64),
    stages: int = 3,
) -> ConvTile:
    """Return the tile of a launch that is not tuned: sizes are powers of two, at least 16 pixels × 16 out channels.

    The sizes are ``pixels``, ``outs`` and ``channels``, rounded up to a power of two and brought between limits: 16 to
    64 pixels; 16 to ``widest`` out channels, and at most 64 for up to 32 in channels, 32 for fewer than 16; in channels
    as ``steps`` says. A tile of at least 4096 results (pixels × out channels) has eight warps, any other four. A
    depthwise tile has at most 32 out channels, ``steps[0]`` in channels, four warps and one stage.

    64 × 128 with eight warps keeps 32 accumulators of 32 bits per lane: the largest tile that spills nothing on any
    target (`tests/operators/test_codegen.py`). Not measured.

    Args:
        pixels: output pixels of the launch.
        outs: out channels of one group; all of them if ``depthwise``.
        channels: in channels of one group; changes nothing if ``depthwise``.
        depthwise: whether each out channel has one in channel; then there is no matrix product.
        widest: most out channels; less than 128 if accumulators or operands are wide.
        steps: fewest and most in channels per step; matrix units take 32 bytes at least, or 16 floats.
        stages: steps whose operands are being loaded at a time.
    """
    rows = min(64, max(16, triton.next_power_of_2(pixels)))
    # Few channels leave most of a step masked, and AMD's compiler unrolls what is left until it spills.
    widest = min(widest, 32 if channels < 16 else 64 if channels <= 32 else 128)
    cols = min(widest, max(16, triton.next_power_of_2(outs)))
    if depthwise:
        return ConvTile(rows, min(cols, 32), steps[0], 4, 1)
    step = min(steps[1], max(steps[0], triton.next_power_of_2(channels)))
    return ConvTile(rows, cols, step, 8 if rows * cols >= 64 * 64 else 4, stages)
