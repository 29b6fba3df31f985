"""Residual joins in PyTorch: the specification of `tritonq.kernels.residual` and the CPU path."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.reference.activation import observe, quantize_, rectify_, straight_through_
from tritonq.reference.quantizer_state import QuantizerState

_BITS = 8
# Planes start where a kernel can read 128 bits at a time.
_ALIGNMENT = 16


class Join(NamedTuple):
    """The result, and one bit per element: whether its gradient passes.

    Attributes:
        y: shaped as the inputs; dense.
        mask: uint8, ceil(n / 8) of them, rounded up to a multiple of 16. The elements of ``y`` in memory order are cut
            into eight planes of that length; plane i is bit i of every byte.
    """

    y: Tensor
    mask: Tensor


def forward(a: Tensor, b: Tensor, quantizer: QuantizerState | None, ceiling: float | None) -> Join:
    """``FQ(relu?(a + b))``: observes the sum, which is float32, and rounds once to the dtype of the inputs.

    Args:
        a: any shape.
        b: of ``a``'s shape and dtype.
        quantizer: per tensor; None leaves the result in float.
        ceiling: of the ReLU before the quantizer; see :func:`tritonq.reference.activation.rectify`.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    y = a.to(wide) + b.to(wide)
    if quantizer is not None:
        quantizer = observe(y, quantizer, ceiling)
    # Threshold and pack before the sum is overwritten, after the observer moved the thresholds.
    passes = straight_through_(torch.ones_like(y), y.clone(), quantizer, ceiling)
    mask = pack(in_memory_order(passes))
    y = rectify_(y, ceiling) if quantizer is None else quantize_(y, quantizer, ceiling)
    return Join(y.to(a.dtype), mask)


def backward(dy: Tensor, mask: Tensor) -> Tensor:
    """``dy`` where the mask's bit is set, else 0: the gradient of both inputs.

    Args:
        dy: in the memory order of the forward's result.
        mask: from the forward.
    """
    bits = torch.empty_like(dy, dtype=torch.float32)
    in_memory_order(bits).copy_(unpack(mask, dy.numel()))
    # Selects, so that an infinite gradient that is blocked becomes 0 and not NaN.
    return torch.ops.aten.threshold_backward(dy, bits.to(dy.dtype), 0)  # type: ignore[no-any-return]


def pack(passes: Tensor) -> Tensor:
    """One bit for each element of a vector of 0.0 and 1.0; see :class:`Join`."""
    length = -(-passes.numel() // (_BITS * _ALIGNMENT)) * _ALIGNMENT
    planes = F.pad(passes, (0, length * _BITS - passes.numel())).view(_BITS, length)
    byte = planes[0].clone()
    for i in range(1, _BITS):
        byte.add_(planes[i], alpha=2**i)
    return byte.to(torch.uint8)


def unpack(mask: Tensor, count: int) -> Tensor:
    """The first ``count`` bits, in the order of :func:`pack`: a uint8 vector, 0 or a power of two."""
    planes = mask.new_empty((_BITS, mask.numel()))
    for i in range(_BITS):
        torch.bitwise_and(mask, 2**i, out=planes[i])
    return planes.view(-1)[:count]


def in_memory_order(x: Tensor) -> Tensor:
    """The elements of a dense tensor as a vector, as they lie in memory."""
    return x.as_strided((x.numel(),), (1,))
