"""Fixed point in PyTorch: the specification of `tritonq.kernels.fixed_point` and the CPU path.

A fixed-point number is a code of some range and a fractional length *frac_len*, its number of fraction bits:
``value = code * 2^-frac_len``. Rounding to it is fake quantization with that scale, `tritonq.reference.fake_quant`.
Multiplying by a power of two is exact, so every backend gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.quantized_type import QuantizedType
from tritonq.reference.operator import New, operator

# Blocks of this many elements stay in cache while every candidate's error is taken from them.
_BLOCK = 2**19
# A sum of so many is one thread's: the result doesn't depend on the number of threads.
_SUM = 2**15


def power_of_two(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``2^exponent`` exactly, by writing the exponent's bits.

    Args:
        exponent: integers of any dtype and shape, in -126..127, for float64 in -1022..1023. The result has its shape.
        dtype: float32 or float64.
    """
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _candidate_shape(arguments: dict[str, Any]) -> tuple[int, ...]:
    return (arguments["candidates"], *arguments["qtype"].granularity.scale_shape(arguments["x"].shape))


@operator(returns=New(_candidate_shape, "x", torch.float64))
def frac_len_errors(x: Tensor, qtype: QuantizedType, candidates: int) -> Tensor:
    """Return ``Σ (x - clamp(round_half_even(x · 2^l)) · 2^-l)²`` for fractional lengths l = 0 to ``candidates - 1``.

    Values that are not finite are left out, as are negative ones in an unsigned format: their errors are the same for
    every candidate.

    Args:
        x: any shape; float16, bfloat16, float32 (squares in float32, sums over blocks in float64) or float64.
        qtype: the range of codes, and the channel axis or None.
        candidates: how many fractional lengths are tried.

    Returns:
        float64 (candidates,), or (candidates, channels) if ``qtype`` has an axis; zeros where no value is counted.
    """
    axis = qtype.axis
    if x.numel() == 0:
        shape = (candidates, *qtype.granularity.scale_shape(x.shape))
        return torch.zeros(shape, dtype=torch.float64, device=x.device)
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
    channels, length = rows.shape
    errors = torch.zeros(candidates, channels, dtype=torch.float64, device=x.device)
    for first in range(0, channels, height := max(1, _BLOCK // max(1, length))):
        band = slice(first, first + height)
        for start in range(0, length, _BLOCK):
            block = rows[band, start : start + _BLOCK]
            _add_errors(errors[:, band], block if x.dtype == torch.float64 else block.float(), qtype)
    return errors[:, 0] if axis is None else errors


def _add_errors(errors: Tensor, block: Tensor, qtype: QuantizedType) -> None:
    """Add the squared errors of a block (channels, elements) to ``errors`` (candidates, channels), in place.

    Candidate l rounds to codes of ``qtype`` times ``2^-l``. ``block`` is float32 or float64 and not changed.
    """
    # 0 is a code of every format: values set to it err nowhere. (A mask and `where` would take as long as three
    # candidates.)
    block = torch.nan_to_num(block, 0.0, 0.0, 0.0)
    if not qtype.signed:
        block = block.relu_()
    work = torch.empty_like(block)
    for frac_len, total in enumerate(errors):
        torch.mul(block, 2.0**frac_len, out=work)
        work.round_().clamp_(qtype.quant_min, qtype.quant_max)
        torch.sub(block, work, alpha=2.0**-frac_len, out=work)
        total += _sum_rows(work.square_())


def _sum_rows(block: Tensor) -> Tensor:
    """Return the sums of the rows of a matrix in float64; parts of a row are added in its own dtype."""
    whole = block.shape[1] // _SUM * _SUM
    parts = block[:, :whole].view(len(block), whole // _SUM, _SUM)
    return parts.sum(2).double().sum(1) + block[:, whole:].sum(1).double()


@operator(returns=New(lambda of: of["qtype"].granularity.scale_shape(of["x"].shape), "x", torch.int32))
def search_frac_len(x: Tensor, qtype: QuantizedType, candidates: int) -> Tensor:
    """Return which of the fractional lengths 0 to ``candidates - 1`` has the least squared rounding error.

    Values that are not finite are left out. Of equal errors the smallest length counts, so 0 if no value is finite.

    Args:
        x: any shape; float16, bfloat16, float32 or float64.
        qtype: the range of codes, and the channel axis or None.
        candidates: how many fractional lengths are tried.

    Returns:
        int32: 0-d, or (channels,) if ``qtype`` has an axis.
    """
    return frac_len_errors(x, qtype, candidates).argmin(0).to(torch.int32)
