"""Scale and zero point by the formula of torch's fused operator that observes and fake quantizes (rule "torch_v1")."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this, torch's operator widens the range: its int32 requantization could not represent 1/scale.
_V1_SMALL_SCALE = 6.1e-5
_V1_ZERO_RANGE_SCALE = 0.1
# The largest float32 whose reciprocal is infinite in float32.
_V1_NO_RECIPROCAL = 2.0**-128


def torch_v1_qparams(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point as torch's fused moving-average operator computes them, mostly in double precision.

    With m and M the ends of the range and ``q = quant_max - quant_min``: affine ``s = (M - m)/q``. A symmetric type
    whose range has values of both signs takes ``-w (q//2 + 1)`` and ``w (q//2)`` for m and M, with
    ``w = max(|m|/(q//2 + 1), M/(q//2))`` in float32 (``M/(q//2)`` is M for q = 1); otherwise it is taken as affine. A
    scale of at most 2^-128, whose reciprocal is infinite in float32, becomes 0.1, and m and M stay as they are. One
    below 6.1e-5 becomes 6.1e-5, and the range is widened to it: if m or M is 0, the other end becomes ``6.1e-5 q`` with
    its sign; else both ends are multiplied by ``6.1e-5 q / (M - m)``.

    The zero point of a symmetric type is ``(quant_min + quant_max + 1) // 2`` if then ``m < 0 < M``. Any other is
    ``quant_min - m/s`` if ``|quant_min| + |m/s| < |quant_max| + |M/s|``, else ``quant_max - M/s``, rounded (ties to
    even) and clamped to the codes.

    Args:
        low: m, float, at most 0.
        high: M, of ``low``'s shape, at least 0.
        quant_min: smallest code.
        quant_max: largest code.
        symmetric: whether the type is symmetric.

    Returns:
        ``(scale, zero_point)`` in ``low``'s shape: float32, and whole numbers in float64.
    """
    low, high = low.float(), high.float()
    codes = quant_max - quant_min
    if symmetric:
        # In float32, as the operator divides: a tiny range becomes 0. By tensors: on GPUs torch would multiply by the
        # reciprocal of a number.
        below, above = torch.full_like(low, codes // 2 + 1), torch.full_like(high, codes // 2)
        widest = torch.maximum(-low / below, high / above if codes > 1 else high)
        two_sided = (low < 0) & (high > 0)
        low, high = torch.where(two_sided, -widest * below, low), torch.where(two_sided, widest * above, high)
    low, high = low.double(), high.double()

    scale = ((high - low) / codes).float().double()
    scale = torch.where(scale <= _V1_NO_RECIPROCAL, _V1_ZERO_RANGE_SCALE, scale)
    small = scale < _V1_SMALL_SCALE
    scale = torch.where(small, _V1_SMALL_SCALE, scale)
    grow_high, grow_low = low == 0, high == 0
    both = (low < 0) & (high > 0)
    amplifier = _V1_SMALL_SCALE / ((high - low) / codes).clamp(min=torch.finfo(torch.float64).tiny)
    high = torch.where(small & grow_high, _V1_SMALL_SCALE * codes, torch.where(small & both, high * amplifier, high))
    low = torch.where(small & grow_low, -_V1_SMALL_SCALE * codes, torch.where(small & both, low * amplifier, low))

    from_min = quant_min - low / scale
    from_max = quant_max - high / scale
    error_min = abs(quant_min) + (low / scale).abs()
    error_max = abs(quant_max) + (high / scale).abs()
    zero_point = torch.where(error_min < error_max, from_min, from_max)
    if symmetric:
        zero_point = torch.where(both, float((quant_min + quant_max + 1) // 2), zero_point)
    return scale.float(), zero_point.round().clamp(quant_min, quant_max)
