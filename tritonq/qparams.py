"""Quantized types, and the one function that turns a range into scale and zero point.

Training, conversion and every export call :func:`range_to_qparams`: the numbers a model was trained with are the
numbers it is deployed with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from tritonq.arithmetic import NUMBERS, TENSORS, Arithmetic, as_dtype
from tritonq.arithmetic import round_half_away as round_half_away
from tritonq.formats import FLOAT_FORMATS, CodeSet, FloatCodes, FloatFormat
from tritonq.granularity import Granularity
from tritonq.torch_v1_qparams import torch_v1_qparams

Rounding = Literal["half_even", "half_away"]
RangeRule = Literal["torch", "torch_v1", "megengine"]
_Value = TypeVar("_Value", Tensor, np.float32)

# torch.ao's default eps; MegEngine's floor under every scale.
TORCH_EPS = torch.finfo(torch.float32).eps
MEGENGINE_EPS = 1e-5


def check_code_range(quant_min: int, quant_max: int) -> None:
    """Raise unless ``quant_min < quant_max`` are integers that span at most 2^32 codes."""
    for name, value in (("quant_min", quant_min), ("quant_max", quant_max)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if quant_min >= quant_max:
        raise ValueError(f"quant_min must be below quant_max, got {quant_min} and {quant_max}")
    if quant_max - quant_min >= 2**32:
        raise ValueError(f"a quantized type has at most 2^32 codes, got {quant_min}..{quant_max}")


def check_rounding(rounding: str) -> None:
    """Raise unless ``rounding`` is a known mode."""
    if rounding not in get_args(Rounding):
        raise ValueError(f"unknown rounding {rounding!r}; known: {', '.join(get_args(Rounding))}")


@dataclass(frozen=True)
class QuantizedType:
    """A grid without its scale: which codes exist, whether zero is pinned, and how values are rounded to it.

    ``code = clip(round(x / scale) + zero_point, quant_min, quant_max)``, ``value = (code - zero_point) * scale``. Codes
    of floats (:meth:`of_floats`) have no zero point: ``value = float(code) * scale``.

    Attributes:
        quant_min: smallest code.
        quant_max: largest code.
        symmetric: the zero point is fixed (0 for signed codes, the middle of the range for unsigned ones).
        axis: axis that carries one scale per index, or None for one scale per tensor.
        rounding: ``"half_even"`` multiplies by the reciprocal scale and rounds ties to even (torch, F8Net);
            ``"half_away"`` divides by the scale and rounds ties away from zero (MegEngine).
        codes: ``"integer"``, or a key of :data:`tritonq.formats.FLOAT_FORMATS`, whose codes are counted from the
            smallest to the largest finite value: 0 is zero, and every value has the negative code of its opposite.
        group: one scale per so many consecutive elements along ``axis``, at each index of the other axes; None: no
            groups. Scales are listed as the groups follow each other, ``axis`` running fastest.

    Raises:
        ValueError: ``quant_min >= quant_max``, a range of more than 2^32 codes, an unknown rounding, unknown codes,
            floats with another range or rounding than theirs, or groups without an axis or of no element.

    Examples:
        >>> QuantizedType.of(8, narrow=True)
        QuantizedType(quant_min=-127, quant_max=127, symmetric=True, axis=None, rounding='half_even')
        >>> QuantizedType(0, 127, symmetric=False).bits
        7
    """

    quant_min: int
    quant_max: int
    symmetric: bool = True
    axis: int | None = None
    rounding: Rounding = "half_even"
    codes: CodeSet = "integer"
    group: int | None = None

    def __post_init__(self) -> None:
        check_code_range(self.quant_min, self.quant_max)
        Granularity(self.axis, self.group)
        check_rounding(self.rounding)
        if self.codes not in get_args(CodeSet):
            raise ValueError(f"unknown codes {self.codes!r}; known: {', '.join(get_args(CodeSet))}")
        number = self.float_format
        if number is not None:
            given = (self.quant_min, self.quant_max, self.symmetric, self.rounding)
            if given != (-number.largest_code, number.largest_code, True, "half_even"):
                raise ValueError(f"QuantizedType.of_floats makes types of {self.codes} codes, got {given}")

    def __repr__(self) -> str:
        """Return fields, without the codes where they are integers, and without groups where there are none."""
        named = self.to_data()
        if self.codes == "integer":
            del named["codes"]
        return f"QuantizedType({', '.join(f'{name}={value!r}' for name, value in named.items())})"

    @classmethod
    def of(
        cls,
        bits: int,
        *,
        signed: bool = True,
        narrow: bool = False,
        symmetric: bool = True,
        axis: int | None = None,
        group: int | None = None,
        rounding: Rounding = "half_even",
    ) -> QuantizedType:
        """Build the type from its width: signed two's complement, or unsigned from zero.

        Raises:
            ValueError: ``bits`` outside 1..32, a narrow range that is unsigned or narrower than 2 bits, or groups
                without an axis or of no element.

        Examples:
            >>> QuantizedType.of(4, axis=1, group=32).granularity.scale_shape((8, 64))
            (8, 2)
        """
        if not 1 <= bits <= 32:
            raise ValueError(f"bits must be in 1..32, got {bits}")
        if narrow and (not signed or bits < 2):
            raise ValueError(f"a narrow range is signed and at least 2 bits wide, got {bits} bits, signed={signed}")
        quant_min = -(2 ** (bits - 1)) + int(narrow) if signed else 0
        quant_max = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        return cls(quant_min, quant_max, symmetric, axis, rounding, group=group)

    @classmethod
    def of_floats(cls, codes: FloatCodes, axis: int | None = None) -> QuantizedType:
        """Build the type whose values are the finite numbers of a float format times the scale.

        Raises:
            ValueError: an unknown format.

        Examples:
            >>> QuantizedType.of_floats("e2m1")
            QuantizedType(quant_min=-7, quant_max=7, symmetric=True, axis=None, rounding='half_even', codes='e2m1')
        """
        if codes not in FLOAT_FORMATS:
            raise ValueError(f"unknown format {codes!r}; known: {', '.join(FLOAT_FORMATS)}")
        largest = FLOAT_FORMATS[codes].largest_code
        return cls(-largest, largest, axis=axis, codes=codes)

    @property
    def float_format(self) -> FloatFormat | None:
        """The format of float codes; None where codes are integers."""
        return None if self.codes == "integer" else FLOAT_FORMATS[self.codes]

    @property
    def reach(self) -> float:
        """How many scales a symmetric range extends to either side."""
        number = self.float_format
        return (self.quant_max - self.quant_min) / 2 if number is None else number.largest

    @property
    def bits(self) -> int:
        """Width in bits of the codes."""
        return (self.quant_max - self.quant_min).bit_length()

    @property
    def signed(self) -> bool:
        """Whether negative codes exist."""
        return self.quant_min < 0

    @property
    def narrow(self) -> bool:
        """Whether the range leaves out the most negative two's complement code."""
        return self.signed and self.quant_min == -self.quant_max

    @property
    def fixed_zero_point(self) -> int | None:
        """The zero point when the type alone decides it, else None.

        Symmetric signed types use 0, symmetric unsigned ones the middle of their range, as torch.ao does.
        """
        if not self.symmetric:
            return None
        return 0 if self.signed else (self.quant_min + self.quant_max + 1) // 2

    @property
    def granularity(self) -> Granularity:
        """Which elements of a tensor share a scale."""
        return Granularity(self.axis, self.group)

    @property
    def row_type(self) -> QuantizedType:
        """The type of a matrix with one group per row; the type itself where there are no groups."""
        return self if self.group is None else replace(self, axis=0, group=None)

    def to_data(self) -> dict[str, Any]:
        """Return the fields by name, as files hold them: without groups where there are none."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.group is None:
            del named["group"]
        return named

    @property
    def storage_dtype(self) -> torch.dtype:
        """The smallest torch integer dtype that holds every code."""
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
            info = torch.iinfo(dtype)
            if info.min <= self.quant_min and self.quant_max <= info.max:
                return dtype
        return torch.int64

    def with_axis(self, axis: int | None) -> QuantizedType:
        """Return the same grid with one scale per index of ``axis`` (None: one scale per tensor)."""
        return replace(self, axis=axis, group=None)

    def with_codes(self, quant_min: int, quant_max: int) -> QuantizedType:
        """Return the same grid with other codes."""
        return replace(self, quant_min=quant_min, quant_max=quant_max)


QINT8 = QuantizedType.of(8)
QINT8_NARROW = QuantizedType.of(8, narrow=True)
QUINT8 = QuantizedType.of(8, signed=False, symmetric=False)
QINT4 = QuantizedType.of(4)
QUINT4 = QuantizedType.of(4, signed=False, symmetric=False)
QINT2 = QuantizedType.of(2)
QUINT2 = QuantizedType.of(2, signed=False, symmetric=False)
QINT1 = QuantizedType.of(1, signed=False, symmetric=False)
QINT32 = QuantizedType.of(32)

# MegEngine's names of types, for presets and saved files.
QUANTIZED_TYPES: dict[str, QuantizedType] = {
    "qint8": QINT8,
    "qint8_narrow": QINT8_NARROW,
    "quint8": QUINT8,
    "qint4": QINT4,
    "quint4": QUINT4,
    "qint2": QINT2,
    "quint2": QUINT2,
    "qint1": QINT1,
    "qint32": QINT32,
}


def fixed_zero_point(qtype: QuantizedType, rule: RangeRule) -> int | None:
    """Return the zero point that type and rule decide alone, else None: MegEngine's symmetric types all use 0."""
    fixed = qtype.fixed_zero_point
    return 0 if rule == "megengine" and fixed is not None else fixed


class QParams(NamedTuple):
    """Scale (float32) and zero point (int32), 0-d per tensor or of shape (channels,)."""

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
    - ``"megengine"``: the same scales with eps 1e-5; symmetric ``z = 0``, for unsigned codes too; affine
      ``z = quant_min - round_half_away(m/s)``, not clamped.
    - ``"torch_v1"`` (torch's fused observe and fake-quantize operator): symmetric
      ``s = max(|m|/128, M/127)``; a range with values of one sign is taken as affine. It ignores eps, and exists so
      that such checkpoints can be reproduced. It has no float codes.

    Float codes of largest value ``L``: ``s = max(max(-m, M) / L, eps)``, ``z = 0``.

    A range that was never observed (``min_val > max_val``) or is not finite gives ``s = 1``, and the type's fixed zero
    point or else ``z = 0`` clamped into the code range.

    Args:
        min_val: float tensor, 0-d or (channels,).
        max_val: as ``min_val``.
        qtype: the grid.
        rule: which system's formula.
        eps: floor under the scale; None takes the rule's own.
        ordered: whether the caller knows that every range was observed and is finite.

    Returns:
        Scale as float32 and zero point as int32, shaped like ``min_val``.

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
    """Compute :func:`range_to_qparams` of one finite range with ``min_val <= max_val``, bit for bit, without a tensor.

    On a CPU an operator on one element costs as much as one on a thousand.
    """
    with np.errstate(over="ignore"):
        scale, zero_point = _linear_qparams(np.float32(min_val), np.float32(max_val), qtype, rule, eps)
    return float(scale), int(zero_point)


def is_readable(values: Tensor) -> bool:
    """Whether looking at the values costs no synchronisation with a device and no break in a traced graph."""
    return values.is_cpu and not torch.compiler.is_compiling()


def known_ordered(low: Tensor, high: Tensor) -> bool:
    """Whether every range is known to have ``low <= high``, both finite: False where looking costs a synchronisation.

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
    """Return zero points as int32 in the shape of ``scale``."""
    if isinstance(zero_point, int):
        return torch.full_like(scale, zero_point, dtype=torch.int32)
    return zero_point.to(torch.int32)


def _observed_qparams(
    low: Tensor, high: Tensor, qtype: QuantizedType, rule: RangeRule, eps: float | None
) -> tuple[Tensor, Tensor | int]:
    """Return scale and zero point of finite ranges, before zero is brought into them; an int for one that is fixed."""
    if rule == "torch_v1":
        ends = (qtype.quant_min, qtype.quant_max)
        return torch_v1_qparams(low.clamp(max=0), high.clamp(min=0), *ends, symmetric=qtype.symmetric)
    default_eps = MEGENGINE_EPS if rule == "megengine" else TORCH_EPS
    return _linear_qparams(low, high, qtype, rule, default_eps if eps is None else eps)


def _linear_qparams(
    low: _Value, high: _Value, qtype: QuantizedType, rule: RangeRule, eps: float
) -> tuple[_Value, _Value | int]:
    """Apply torch.ao's observer rule or MegEngine's, which differ in eps and in the affine zero point.

    One formula for tensors and for float32 numbers.
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
