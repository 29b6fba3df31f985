"""The geometry of a transposed convolution as a plain one; see `tritonq.deploy.onnx_transposed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn


@dataclass(frozen=True)
class Phases:
    """One axis of a transposed convolution as a plain one.

    Attributes:
        stride: how many phases there are.
        taps: places of the plain kernel.
        before: zeros before the input; ``after`` those behind it.
        first: how many results to cut off in front; ``last`` how many at the end.
    """

    stride: int
    taps: int
    before: int
    after: int
    first: int
    last: int

    @classmethod
    def of(cls, kernel: int, stride: int, padding: int, output_padding: int) -> Phases:
        """Return the phases of an axis; ``kernel`` is the extent of a dilated kernel, gaps included."""
        taps = -(-kernel // stride)
        surplus = taps * stride - kernel + padding - output_padding
        before, after = (taps - 1 - cut // stride for cut in (padding, surplus))
        return cls(stride, taps, before, after, padding % stride, surplus % stride)


def phases_of_kernel(layer: nn.ConvTranspose2d) -> tuple[Phases, Phases] | None:
    """Return the phases along height and width; None where a padding is larger than the kernel."""
    kernel = [reach(size, step) for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    padding = cast("tuple[int, ...]", layer.padding)
    sizes = zip(kernel, layer.stride, padding, layer.output_padding, strict=True)
    height, width = (Phases.of(*axis) for axis in sizes)
    return None if min(height.before, height.after, width.before, width.after) < 0 else (height, width)


def reach(kernel: int, dilation: int) -> int:
    """Return the length of a kernel with the places between its own."""
    return (kernel - 1) * dilation + 1
