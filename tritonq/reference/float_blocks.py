"""Blocks of small floats with a scale each, in PyTorch: the specification of `tritonq.kernels.float_blocks`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tritonq.formats import FLOAT_FORMATS, BlockFormat, FloatFormat
from tritonq.reference.fake_quant import arithmetic_dtype
from tritonq.reference.fixed_point import power_of_two
from tritonq.reference.float_rounding import round_to_float_
from tritonq.reference.operator import Like, operator

# Exponents of e8m0, and float32's greatest one, beyond which a scale times an element overflows.
_LEAST_SCALE_EXPONENT, _GREATEST_EXPONENT = -127, 127


@operator(returns=Like("x"))
def fake_quantize_blocks(
    x: Tensor, blocks: BlockFormat, axis: int, tensor_scale: Tensor | None = None, enabled: Tensor | None = None
) -> Tensor:
    """Return ``round(x / s) * s`` with one scale ``s`` for each block of consecutive elements along ``axis``.

    With ``m`` the largest magnitude in the block, ``L = 2^E * f`` the largest number of the elements' format,
    ``1 <= f < 2``:

    - e8m0 scales, powers of two: ``s = 2^clamp(e, -127, 127 - E)``, ``e = floor(log2 m) - E``; with
      ``blocks.scale_rounding`` of ``"ceil"``, not ``"floor"``, one more where ``m > L * 2^e``.
    - e4m3 scales: ``s = e4m3(m * (1 / (L * t))) * t`` with the tensor's scale ``t``; 0 where that is below float32's
      normal numbers, and so where ``L * t`` is.

    Elements saturate, ties go to even, infinities count as the largest finite float32. Where s is 0, finite elements
    become 0, and infinities NaN. A block with NaN becomes NaN. The last block along ``axis`` may have fewer elements.

    Args:
        x: any shape; float16, bfloat16, float32 or float64 (which computes in float64). The result has its dtype.
        blocks: the elements' format, the block size, and how e8m0 scales are rounded; ``blocks.scale`` is not read.
        axis: that blocks run along; not negative.
        tensor_scale: t, float32, one element, which makes scales e4m3; None makes them e8m0.
        enabled: the switch, one element: 0 returns a copy of ``x``. None: always on.

    Source: OCP Microscaling Formats (MX) Specification 1.0, section 6.3; NVIDIA Model-Optimizer, NVFP4.
    """
    dtype = arithmetic_dtype(x.dtype)
    values = torch.empty_like(x, dtype=dtype).copy_(x)
    for block in _in_blocks(values, axis, blocks.size):
        largest = block.abs().amax(axis + 1, keepdim=True)
        is_nan = largest.isnan()
        largest.nan_to_num_(0.0, torch.finfo(torch.float32).max)
        if tensor_scale is None:
            scale, reciprocal = _power_of_two_scales(largest, blocks)
        else:
            scale, reciprocal = _float_scales(largest, blocks.element_format, tensor_scale.to(dtype))
        round_to_float_(block.mul_(reciprocal), blocks.element_format)
        block.mul_(scale.masked_fill_(is_nan, torch.nan))
    y = values.to(x.dtype)
    return y if enabled is None else torch.where(enabled.view(()) != 0, y, x)


def block_scales(x: Tensor, blocks: BlockFormat, axis: int, tensor_scale: Tensor | None = None) -> Tensor:
    """Return the scale that :func:`fake_quantize_blocks` gives each block of a finite tensor.

    With m the block's largest magnitude and ``L = 2^E · f`` (1 <= f < 2) the largest number of the elements' format:
    ``2^(floor(log2 m) - E)`` for e8m0 scales, with ``scale_rounding`` of ``"ceil"`` twice that where m would saturate;
    ``e4m3(m · (1 / (L · t))) · t`` for e4m3 scales. The exponent of e8m0 scales is clamped to ``-127 .. 127 - E``.
    A block of zeros has the scale ``2^(-1-E)``, or 0 with e4m3 scales, of which those below 2^-126 become 0, too.

    Args:
        x: float32; its size along ``axis`` is a multiple of ``blocks.size``.
        blocks: the elements' format, the block size, and how e8m0 scales are rounded; ``blocks.scale`` is not read.
        axis: that blocks run along; not negative.
        tensor_scale: t, float32, one element, which makes scales e4m3; None makes them e8m0.

    Returns:
        float32, shaped as ``x`` with one index per block along ``axis``.
    """
    parts = torch.unflatten(x, axis, (-1, blocks.size)).abs().amax(axis + 1)
    if tensor_scale is None:
        return _power_of_two_scales(parts, blocks)[0]
    return _float_scales(parts, blocks.element_format, tensor_scale)[0]


def _in_blocks(values: Tensor, axis: int, size: int) -> Iterator[Tensor]:
    """Yield views in which ``axis`` is split into (blocks, elements of a block).

    A shorter last block is a view of its own.
    """
    length = values.shape[axis]
    whole = length - length % size
    for start, count in ((0, whole), (whole, length - whole)):
        if count and values.numel():
            yield torch.unflatten(values.narrow(axis, start, count), axis, (-1, min(size, count)))


def _power_of_two_scales(largest: Tensor, blocks: BlockFormat) -> tuple[Tensor, Tensor]:
    """Return the scales of blocks, powers of two, from their largest magnitudes, and the reciprocals; both exact."""
    elements = blocks.element_format
    fraction, exponent = torch.frexp(largest)  # fraction in [1/2, 1)
    exponent = exponent - 1 - elements.greatest_exponent
    if blocks.scale_rounding == "ceil":
        exponent = exponent + (fraction > elements.largest * 2.0 ** -(elements.greatest_exponent + 1))
    # frexp says that zero has exponent 0; every scale holds it.
    exponent = exponent.clamp(_LEAST_SCALE_EXPONENT, _GREATEST_EXPONENT - elements.greatest_exponent)
    # By way of float64, in which the smallest scale is a normal number.
    scale, reciprocal = (power_of_two(power, torch.float64).to(largest.dtype) for power in (exponent, -exponent))
    return scale, reciprocal


def _float_scales(largest: Tensor, elements: FloatFormat, tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales ``e4m3(m / (L · t)) · t`` of blocks from their largest magnitudes m, and the reciprocals.

    L is the largest number of ``elements``, t ``tensor_scale``. Both results are 0 where the scale is below float32's
    normal numbers. ``largest`` is overwritten.
    """
    tensor_scale = tensor_scale.view(())
    steps = largest.mul_(_reciprocal_or_zero(tensor_scale * elements.largest))
    scale = round_to_float_(steps, FLOAT_FORMATS["e4m3"]).mul_(tensor_scale)
    reciprocal = _reciprocal_or_zero(scale)
    return scale.masked_fill_(reciprocal == 0, 0.0), reciprocal


def _reciprocal_or_zero(values: Tensor) -> Tensor:
    """Return ``1 / values``; 0 below float32's normal numbers, whose reciprocals may be infinite."""
    return torch.where(values >= torch.finfo(torch.float32).tiny, values.reciprocal(), 0.0)
