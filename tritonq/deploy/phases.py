"""The geometry of a transposed convolution as a plain one, along one axis.

Element ``i`` of the input reaches the elements ``i·s + k - p`` of the output, for each place ``k`` of the kernel, with
stride s and padding p. With ``k = q·s + r`` the outputs of one *phase* ``r`` are a plain convolution over the places
``q``, its *taps*. Phases are computed as channels and then interleaved (`tritonq.deploy.onnx_transposed`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn


@dataclass(frozen=True)
class Phases:
    """One axis of a transposed convolution as a plain one.

    Attributes:
        stride: how many phases there are; the plain convolution's own stride is 1.
        taps: size of the plain kernel, ``ceil(kernel / stride)``.
        before: zeros to add before the input; negative: the axis can't be computed so.
        after: zeros to add behind it; negative: as for ``before``.
        first: how many results to cut off at the beginning, after interleaving.
        last: how many results to cut off at the end.
    """

    stride: int
    taps: int
    before: int
    after: int
    first: int
    last: int

    @classmethod
    def of(cls, kernel: int, stride: int, padding: int, output_padding: int) -> Phases:
        """Return the phases of an axis of a transposed convolution, by ``nn.ConvTranspose1d``'s arguments.

        But ``kernel`` counts the gaps of a dilated kernel. With ``taps = ceil(kernel / stride)`` and ``surplus = taps ·
        stride - kernel + padding - output_padding``: before is ``taps - 1 - padding // stride``, first ``padding %
        stride``, after ``taps - 1 - surplus // stride``, last ``surplus % stride``. Before is negative if ``padding >=
        taps · stride``, after if ``padding - output_padding >= kernel``.
        """
        taps = -(-kernel // stride)
        surplus = taps * stride - kernel + padding - output_padding
        before, after = (taps - 1 - cut // stride for cut in (padding, surplus))
        return cls(stride, taps, before, after, padding % stride, surplus % stride)


def phases_of_kernel(layer: nn.modules.conv._ConvTransposeNd) -> tuple[Phases, ...] | None:
    """Return the phases along each axis of the kernel; None if ``before`` or ``after`` of one of them is negative.

    That happens only where the padding is as long as the kernel with its gaps, or longer.
    """
    kernel = [reach(size, step) for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    padding = cast("tuple[int, ...]", layer.padding)
    sizes = zip(kernel, layer.stride, padding, layer.output_padding, strict=True)
    found = tuple(Phases.of(*axis) for axis in sizes)
    return None if min(min(axis.before, axis.after) for axis in found) < 0 else found


def reach(kernel: int, dilation: int) -> int:
    """Return the length of a dilated kernel, gaps included: ``(kernel - 1) · dilation + 1``."""
    return (kernel - 1) * dilation + 1
