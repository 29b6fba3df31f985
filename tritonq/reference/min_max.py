"""Running ranges in PyTorch: the specification of `tritonq.kernels.min_max` and the CPU path."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tritonq.qparams import QuantizedType, RangeRule, known_ordered, number_to_qparams, range_to_qparams

_Number = TypeVar("_Number", np.float32, np.float64)
_NUMBERS: dict[torch.dtype, type[Any]] = {torch.float32: np.float32, torch.float64: np.float64}


def min_max(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest finite value, and how many values are not finite.

    Args:
        x: any shape, any float dtype; may be empty.
        axis: keep one range per index of this axis; None for one range.

    Returns:
        ``(low, high, nonfinite)``: float32, float32 and int64, 0-d or (x.shape[axis],) (the count is 0-d always).
        Without a finite value ``low`` is +inf and ``high`` is -inf.
    """
    low, high, nonfinite = extremes(x, axis)
    return low, high, _zero_count(x) if nonfinite is None else nonfinite


def extremes(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`min_max`, with None for the count where it is known that every value is finite, and that there are some.

    Args:
        x: see there.
        axis: see there.
    """
    channels = () if axis is None else (x.shape[axis],)
    if x.numel() == 0:
        return x.new_full(channels, torch.inf).float(), x.new_full(channels, -torch.inf).float(), _zero_count(x)
    kept = None if axis is None else axis % x.dim()
    if kept is not None and x.dim() == 1:
        x = x.unsqueeze(1)  # an empty list of dimensions would reduce all of them
    dims = [d for d in range(x.dim()) if d != kept]
    low, high = x.amin(dims), x.amax(dims)
    # NaN and infinities show in the extremes, so that the usual, finite case needs no second look at the data.
    # (The branch reads CPU values; other devices and traced graphs always take the second look instead.)
    if known_ordered(low, high):
        return low.float(), high.float(), None
    finite = torch.isfinite(x)
    low = torch.where(finite, x, torch.inf).amin(dims)
    high = torch.where(finite, x, -torch.inf).amax(dims)
    return low.float(), high.float(), (~finite).sum()


def update_range(
    low: Tensor,
    high: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    averaging_constant: float | None,
    copy_above: float | None = None,
) -> tuple[Tensor, Tensor]:
    """New running range from a batch's ``low`` and ``high``.

    ``averaging_constant`` None: running minimum and maximum. Else ``m + c (low - m)``, where the first batch is
    copied, and so is one whose largest magnitude, ``max(-low, high)``, is more than ``copy_above`` times the running
    one's (None: none is). A batch without finite values (``low > high``) changes nothing.
    """
    if averaging_constant is None:
        return torch.minimum(min_val, low), torch.maximum(max_val, high)
    seen = min_val <= max_val
    if copy_above is not None:
        # In float64, where the product is rounded as Python rounds it.
        magnitude = torch.maximum(-min_val, max_val).double()
        seen = seen & (torch.maximum(-low, high).double() <= copy_above * magnitude)
    new_min = torch.where(seen, min_val + averaging_constant * (low - min_val), low)
    new_max = torch.where(seen, max_val + averaging_constant * (high - max_val), high)
    usable = low <= high
    return torch.where(usable, new_min, min_val), torch.where(usable, new_max, max_val)


def update_number(
    low: _Number,
    high: _Number,
    min_val: _Number,
    max_val: _Number,
    averaging_constant: float | None,
    copy_above: float | None = None,
) -> tuple[_Number, _Number]:
    """:func:`update_range` of one range as NumPy numbers, bit for bit; ``low <= high``, both finite."""
    if averaging_constant is None:
        return min(min_val, low), max(max_val, high)
    outgrows = copy_above is not None and float(max(-low, high)) > copy_above * float(max(-min_val, max_val))
    if not min_val <= max_val or outgrows:
        return low, high
    constant = type(low)(averaging_constant)
    return min_val + constant * (low - min_val), max_val + constant * (high - max_val)


def merge_range_(
    low: Tensor,
    high: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qtype: QuantizedType,
    averaging_constant: float | None,
    rule: RangeRule,
    eps: float,
    copy_above: float | None = None,
) -> None:
    """:func:`update_range` in place, and the qparams that follow.

    For tensors on the CPU of which it is known that ``low <= high``, both finite. Arguments as for :func:`observe`;
    ``zero_point`` may be None where it is fixed.
    """
    if low.dim() == 0 and rule != "torch_v1" and min_val.dtype in _NUMBERS:
        kind = _NUMBERS[min_val.dtype]
        ends = (kind(float(low)), kind(float(high)), kind(float(min_val)), kind(float(max_val)))
        with np.errstate(over="ignore"):
            new_min, new_max = update_number(*ends, averaging_constant, copy_above)
        min_val.fill_(float(new_min))
        max_val.fill_(float(new_max))
        if scale is not None:
            number, zero = number_to_qparams(float(new_min), float(new_max), qtype, rule, eps)
            scale.fill_(number)
            if zero_point is not None:
                zero_point.fill_(zero)
        return
    if averaging_constant is None:
        torch.minimum(min_val, low, out=min_val)
        torch.maximum(max_val, high, out=max_val)
    elif copy_above is None and min_val.numel() and float(min_val.amax()) < math.inf:
        min_val.add_(torch.sub(low, min_val).mul_(averaging_constant))
        max_val.add_(torch.sub(high, max_val).mul_(averaging_constant))
    else:
        new_min, new_max = update_range(low, high, min_val, max_val, averaging_constant, copy_above)
        min_val.copy_(new_min)
        max_val.copy_(new_max)
    if scale is not None:
        write_qparams_(min_val, max_val, scale, zero_point, qtype, rule, eps, ordered=True)


def write_qparams_(
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qtype: QuantizedType,
    rule: RangeRule,
    eps: float,
    ordered: bool = False,
) -> None:
    """The qparams of a range into a quantizer's buffers; see :func:`tritonq.qparams.range_to_qparams`."""
    qparams = range_to_qparams(min_val, max_val, qtype, rule=rule, eps=eps, ordered=ordered)
    scale.copy_(qparams.scale.view_as(scale))
    if zero_point is not None:
        zero_point.copy_(qparams.zero_point.view_as(zero_point))


def observe(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    enabled: Tensor | None,
    qtype: QuantizedType,
    averaging_constant: float | None,
    rule: RangeRule,
    eps: float,
    copy_above: float | None = None,
) -> None:
    """Update a running range with ``x`` and, when given, the qparams that follow from it. All state is in place.

    Args:
        x: the batch; ranges are kept along ``qtype.axis``.
        min_val: float32, 0-d or (channels,), +inf before the first batch.
        max_val: as ``min_val``, -inf before the first batch.
        nonfinite_count: int64, 0-d; grows by the number of values skipped.
        scale: float32, one element or (channels,), or None to keep ranges only.
        zero_point: int32, as ``scale``.
        enabled: uint8, one element; 0 makes the call do nothing. None counts as 1.
        qtype: the grid for the qparams.
        averaging_constant: see :func:`update_range`.
        rule: see :func:`tritonq.qparams.range_to_qparams`.
        eps: floor under the scale.
        copy_above: see :func:`update_range`.
    """
    if enabled is not None and not bool(enabled):
        return
    low, high, nonfinite = extremes(x, qtype.axis)
    if nonfinite is None:
        qparams = (scale, zero_point, qtype)
        merge_range_(low, high, min_val, max_val, *qparams, averaging_constant, rule, eps, copy_above)
        return
    new_min, new_max = update_range(low, high, min_val, max_val, averaging_constant, copy_above)
    min_val.copy_(new_min)
    max_val.copy_(new_max)
    nonfinite_count.add_(nonfinite)
    if scale is not None:
        write_qparams_(min_val, max_val, scale, zero_point, qtype, rule, eps)


def _zero_count(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=x.device)
