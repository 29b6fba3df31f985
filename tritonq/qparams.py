"""The one function that turns a range into scale and zero point.

Training, conversion and every export call :func:`range_to_qparams`: the numbers a model was trained with are the
numbers it is deployed with. *qparams* are a scale and a zero point. A *rule* is the formula of one system: ``"torch"``,
``"megengine"`` or ``"torch_v1"``.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from tritonq.arithmetic import NUMBERS, TENSORS, Arithmetic, as_dtype
from tritonq.quantized_type import QuantizedType
from tritonq.torch_v1_qparams import torch_v1_qparams

RangeRule = Literal["torch", "torch_v1", "megengine"]
_Value = TypeVar("_Value", Tensor, np.float32)

# torch.ao's default eps; MegEngine's floor under every scale.
TORCH_EPS = torch.finfo(torch.float32).eps
MEGENGINE_EPS = 1e-5


def fixed_zero_point(qtype: QuantizedType, rule: RangeRule) -> int | None:
    """Return the zero point of a symmetric type, which does not depend on the range; None for an affine type.

    It is 0 for signed codes (float codes are), and the middle of unsigned ones, rounded up (128 of 0..255); 0 for both
    by the rule ``"megengine"``.
    """
    fixed = qtype.fixed_zero_point
    return 0 if rule == "megengine" and fixed is not None else fixed


class QParams(NamedTuple):
    """Scale and zero point of a grid; 0-d or (1,) per tensor, else 1-d, with one element per channel or group.

    Attributes:
        scale: float32.
        zero_point: int32.

    Examples:
        >>> scale, zero_point = QParams(torch.tensor(0.5), torch.tensor(3, dtype=torch.int32))
        >>> (torch.tensor(4) - zero_point) * scale    # the value of code 4
        tensor(0.5000)
    """

    scale: Tensor
    zero_point: Tensor


def range_to_qparams(
    min_val: Tensor,
    max_val: Tensor,
    qtype: QuantizedType,
    *,
    rule: RangeRule = "torch",
    eps: float | None = None,
    ordered: bool = False,
) -> QParams:
    """Turn a range into scale and zero point, for training, conversion and export alike; kernels repeat it bit for bit.

    With ``m = min(0, min_val)``, ``M = max(0, max_val)``, ``q = quant_max - quant_min``:

    - ``"torch"`` (torch.ao observers): symmetric ``s = max(max(-m, M) / (q/2), eps)`` with the type's fixed zero
      point; affine ``s = max((M - m)/q, eps)``, ``z = clamp(quant_min - round_half_even(m/s), quant_min, quant_max)``.
    - ``"megengine"``: the same scales, by default with eps 1e-5; symmetric ``z = 0``, for unsigned codes
      too; affine ``z = quant_min - round_half_away(m/s)``, not clamped.
    - ``"torch_v1"`` (torch's fused observe and fake-quantize operator), of 8 bits: symmetric
      ``s = max(|m|/128, M/127)``; a range with values of one sign is taken as affine. It ignores eps, and exists so
      that such checkpoints can be reproduced. It has no float codes. `tritonq.torch_v1_qparams` has it whole.

    Float codes of largest value ``L``: ``s = max(max(-m, M) / L, eps)``, ``z = 0``.

    A range that was never observed (``min_val > max_val``) or is not finite gives ``s = 1``, and the fixed zero point
    (:func:`fixed_zero_point`) or else ``z = 0`` clamped into the code range.

    Args:
        min_val: float tensor of the smallest values: 0-d or (1,), or one element per channel or group.
        max_val: the largest values, of the same shape.
        qtype: the type of the codes; its axis and group are not used.
        rule: which system's formula.
        eps: floor under the scale; None: 1e-5 for ``"megengine"``, 2^-23 for ``"torch"``. ``"torch_v1"`` ignores it.
        ordered: whether the caller knows that every range was observed and is finite, which is then not checked.

    Returns:
        Scale as float32 and zero point as int32, new tensors of ``min_val``'s shape and device.

    Raises:
        ValueError: unknown rule, one without float codes for them, or ranges of different shapes.

    Source: docs/numbers.md, "From a range to a scale"; torch.ao.quantization.observer; MegEngine quantization.utils.

    Examples:
        >>> qtype = QuantizedType(0, 255, symmetric=False)
        >>> scale, zero_point = range_to_qparams(torch.tensor(-1.0), torch.tensor(4.1), qtype)
        >>> round(float(scale), 4), int(zero_point)
        (0.02, 50)
    """
    if rule not in get_args(RangeRule):
        raise ValueError(f"unknown range rule {rule!r}; known: {', '.join(get_args(RangeRule))}")
    if rule == "torch_v1" and qtype.float_format is not None:
        raise ValueError(f"rule 'torch_v1' is of integer codes, got {qtype.codes}")
    if min_val.shape != max_val.shape:
        raise ValueError(f"min_val and max_val differ in shape: {tuple(min_val.shape)} and {tuple(max_val.shape)}")
    if ordered or known_ordered(min_val, max_val):
        # The usual case takes a third of the operators; on a small tensor each costs as much as on a scalar.
        scale, zero_point = _observed_qparams(
            as_dtype(min_val, torch.float32), as_dtype(max_val, torch.float32), qtype, rule, eps
        )
        return QParams(as_dtype(scale, torch.float32), _zero_points(zero_point, scale))
    observed = (min_val <= max_val) & torch.isfinite(min_val) & torch.isfinite(max_val)
    low, high = torch.where(observed, min_val, 0).float(), torch.where(observed, max_val, 0).float()
    scale, zero_point = _observed_qparams(low, high, qtype, rule, eps)
    unobserved_zero = min(max(fixed_zero_point(qtype, rule) or 0, qtype.quant_min), qtype.quant_max)
    return QParams(
        torch.where(observed, scale, 1.0).to(torch.float32),
        torch.where(observed, _zero_points(zero_point, scale), unobserved_zero).to(torch.int32),
    )


def number_to_qparams(
    min_val: float, max_val: float, qtype: QuantizedType, rule: Literal["torch", "megengine"], eps: float
) -> tuple[float, int]:
    """Return ``(scale, zero_point)`` of one range in Python numbers, bit for bit as :func:`range_to_qparams`.

    The range must be finite and have ``min_val <= max_val``; neither is checked. On a CPU this is faster than
    operators on tensors of one element.

    Args:
        min_val: smallest value seen.
        max_val: largest value seen.
        qtype: the type of the codes.
        rule: ``"torch"`` or ``"megengine"``: the formula.
        eps: floor under the scale, such as 1e-5.
    """
    with np.errstate(over="ignore"):
        scale, zero_point = _linear_qparams(np.float32(min_val), np.float32(max_val), qtype, rule, eps)
    return float(scale), int(zero_point)


def is_readable(values: Tensor) -> bool:
    """Whether the host can read the tensor without waiting for a device and without a break in a traced graph."""
    return values.is_cpu and not torch.compiler.is_compiling()


def known_ordered(low: Tensor, high: Tensor) -> bool:
    """Whether every range is known to have ``low <= high``, both finite.

    False if finding out would need a synchronisation with a device or a break in a traced graph, and at NaN. True
    for empty tensors on a CPU.

    Args:
        low: any shape.
        high: of ``low``'s shape.
    """
    if not is_readable(low):
        return False
    if low.numel() == 1:
        return -math.inf < float(low) <= float(high) < math.inf
    if low.numel() == 0:
        return True
    return -math.inf < float(low.amin()) and float(high.amax()) < math.inf and bool((low <= high).all())


def _zero_points(zero_point: Tensor | int, scale: Tensor) -> Tensor:
    """Return ``zero_point``, a number or a tensor, as int32 in the shape of ``scale``."""
    if isinstance(zero_point, int):
        return torch.full_like(scale, zero_point, dtype=torch.int32)
    return zero_point.to(torch.int32)


def _observed_qparams(
    low: Tensor, high: Tensor, qtype: QuantizedType, rule: RangeRule, eps: float | None
) -> tuple[Tensor, Tensor | int]:
    """Return scale and zero point of finite float32 ranges by ``rule``, as :func:`range_to_qparams` has it.

    The zero point is an int if it does not depend on the ranges, else whole numbers in floats of the ranges' shape. The
    ranges need not contain zero: they are widened here. ``eps`` None takes the rule's own.
    """
    if rule == "torch_v1":
        ends = (qtype.quant_min, qtype.quant_max)
        return torch_v1_qparams(low.clamp(max=0), high.clamp(min=0), *ends, symmetric=qtype.symmetric)
    default_eps = MEGENGINE_EPS if rule == "megengine" else TORCH_EPS
    return _linear_qparams(low, high, qtype, rule, default_eps if eps is None else eps)


def _linear_qparams(
    low: _Value, high: _Value, qtype: QuantizedType, rule: RangeRule, eps: float
) -> tuple[_Value, _Value | int]:
    """Apply the rule "torch" or "megengine" of :func:`range_to_qparams` to finite ranges; return scale and zero point.

    ``low`` and ``high`` are float32 tensors, or NumPy numbers; one formula serves both (`tritonq.arithmetic`). The zero
    point is an int if the type fixes it, else whole numbers in float32.
    """
    on: Arithmetic = TENSORS if isinstance(low, Tensor) else NUMBERS
    codes = qtype.quant_max - qtype.quant_min
    fixed = fixed_zero_point(qtype, rule)
    if fixed is not None:
        # With low <= high, one of the two is not negative: zero is in the range without being brought in.
        return on.at_least(on.larger(-low, high) / on.constant(qtype.reach, low), eps), fixed
    low, high = on.at_most(low, 0.0), on.at_least(high, 0.0)
    scale = on.at_least((high - low) / on.constant(codes, low), eps)
    ratio = low / scale
    if rule == "megengine":
        return scale, on.constant(qtype.quant_min, low) - on.round_half_away(ratio)
    zero_point = on.constant(qtype.quant_min, low) - on.round(ratio)
    return scale, on.at_most(on.at_least(zero_point, qtype.quant_min), qtype.quant_max)
