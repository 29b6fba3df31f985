"""Quantized types: which codes a grid has, whether its zero point is fixed, and how values are rounded to it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch

from tritonq.arithmetic import keep_whole_numbers, whole_number
from tritonq.formats import FLOAT_FORMATS, CodeSet, FloatCodes, FloatFormat
from tritonq.granularity import Granularity

Rounding = Literal["half_even", "half_away"]
_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_QSCHEMES = (torch.per_tensor_affine, torch.per_tensor_symmetric, *_PER_CHANNEL)
_SIGNED_DTYPES = {torch.qint8: 8, torch.int8: 8, torch.int16: 16, torch.qint32: 32, torch.int32: 32}
# torch.ao halves the range of 8-bit types alone.
_REDUCIBLE_BITS = 8
_UNSIGNED_DTYPES = {torch.quint8: 8, torch.uint8: 8, torch.quint4x2: 4}


def check_code_range(quant_min: int, quant_max: int) -> None:
    """Check the smallest and largest code of a type.

    Raises:
        TypeError: one is no int.
        ValueError: ``quant_min`` is not below ``quant_max``, or they span more than 2^32 codes.
    """
    for name, value in (("quant_min", quant_min), ("quant_max", quant_max)):
        if whole_number(value) is None:
            raise TypeError(f"{name} must be an int, got {value!r}")
    if quant_min >= quant_max:
        raise ValueError(f"quant_min must be below quant_max, got {quant_min} and {quant_max}")
    if quant_max - quant_min >= 2**32:
        raise ValueError(f"a quantized type has at most 2^32 codes, got {quant_min}..{quant_max}")


def check_rounding(rounding: str) -> None:
    """Raise ValueError unless ``rounding`` is ``"half_even"`` or ``"half_away"``."""
    if rounding not in get_args(Rounding):
        raise ValueError(f"unknown rounding {rounding!r}; known: {', '.join(get_args(Rounding))}")


@dataclass(frozen=True)
class QuantizedType:
    """A grid without its scale: which codes exist, whether the zero point is fixed, and how values are rounded to it.

    ``code = clip(round(x / scale) + zero_point, quant_min, quant_max)``, ``value = (code - zero_point) * scale``. Codes
    of floats (:meth:`of_floats`) have no zero point: ``value = float(code) * scale``.

    Attributes:
        quant_min: smallest code.
        quant_max: largest code.
        symmetric: the zero point is fixed (0 for signed codes, the middle of the range for unsigned ones).
        axis: axis of the quantized tensor with one scale per index, -1 for the last; None: one scale per tensor.
        rounding: ``"half_even"`` multiplies by the reciprocal scale and rounds ties to even (torch, F8Net);
            ``"half_away"`` divides by the scale and rounds ties away from zero (MegEngine).
        codes: ``"integer"``, or a key of :data:`tritonq.formats.FLOAT_FORMATS`, whose codes are counted from the
            smallest to the largest finite value: 0 is zero, and every value has the negative code of its opposite.
        group: one scale per so many consecutive elements along ``axis``, at each index of the other axes; None: no
            groups. Scales are listed as the groups follow each other, ``axis`` running fastest.

    Raises:
        TypeError: codes, an axis or groups that are no whole numbers.
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
        keep_whole_numbers(self, quant_min=self.quant_min, quant_max=self.quant_max, axis=self.axis, group=self.group)
        check_rounding(self.rounding)
        if self.codes not in get_args(CodeSet):
            raise ValueError(f"unknown codes {self.codes!r}; known: {', '.join(get_args(CodeSet))}")
        number = self.float_format
        if number is not None:
            given = (self.quant_min, self.quant_max, self.symmetric, self.rounding)
            if given != (-number.largest_code, number.largest_code, True, "half_even"):
                raise ValueError(f"QuantizedType.of_floats makes types of {self.codes} codes, got {given}")

    def __repr__(self) -> str:
        """Return the fields as text; ``codes`` only for floats, ``group`` only if there are groups."""
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

        Args:
            bits: 1..32.
            signed: codes from ``-2^(bits-1)``, else from 0.
            narrow: leave out the smallest signed code.
            symmetric: the zero point is fixed.
            axis: axis with one scale per index; None: one scale per tensor.
            group: one scale per so many elements along ``axis``; None: no groups.
            rounding: ``"half_even"`` or ``"half_away"``.

        Raises:
            TypeError: bits, axis or groups that are no whole numbers.
            ValueError: ``bits`` outside 1..32, a narrow range that is unsigned or narrower than 2 bits, or groups
                without an axis or of no element.

        Examples:
            >>> QuantizedType.of(4, axis=1, group=32).granularity.scale_shape((8, 64))
            (8, 2)
        """
        whole = whole_number(bits)
        if whole is None:
            raise TypeError(f"bits must be an int, got {bits!r}")
        bits = whole
        if not 1 <= bits <= 32:
            raise ValueError(f"bits must be in 1..32, got {bits}")
        if narrow and (not signed or bits < 2):
            raise ValueError(f"a narrow range is signed and at least 2 bits wide, got {bits} bits, signed={signed}")
        quant_min = -(2 ** (bits - 1)) + int(narrow) if signed else 0
        quant_max = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        return cls(quant_min, quant_max, symmetric, axis, rounding, group=group)

    @classmethod
    def of_floats(cls, codes: FloatCodes, axis: int | None = None) -> QuantizedType:
        """Build the type whose values are the finite numbers of the format ``codes`` times the scale.

        ``codes`` is a key of :data:`tritonq.formats.FLOAT_FORMATS`; ``axis`` as :meth:`of` takes it.

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
        """Largest value of a symmetric range in steps, ``(quant_max - quant_min) / 2``; 127.5 for -128..127.

        Of float codes it is the format's largest number. The rule ``"torch"`` scales values up to ±v by ``v / reach``.
        """
        number = self.float_format
        return (self.quant_max - self.quant_min) / 2 if number is None else number.largest

    @property
    def bits(self) -> int:
        """Bits that number all codes; 8 for 0..255 and -127..127, 7 for 0..127."""
        return (self.quant_max - self.quant_min).bit_length()

    @property
    def signed(self) -> bool:
        """Whether negative codes exist."""
        return self.quant_min < 0

    @property
    def narrow(self) -> bool:
        """Whether codes are signed and reach as far below 0 as above it, as -127..127."""
        return self.quant_min == -self.quant_max

    @property
    def fixed_zero_point(self) -> int | None:
        """The zero point that a symmetric type has whatever its range is; None for types that are not symmetric.

        It is 0 with negative codes, as float formats have, else the middle of the codes, rounded up: 128 of 0..255.
        """
        if not self.symmetric:
            return None
        return 0 if self.signed else (self.quant_min + self.quant_max + 1) // 2

    @property
    def granularity(self) -> Granularity:
        """The :class:`Granularity` of ``axis`` and ``group``, which says what elements of a tensor share a scale."""
        return Granularity(self.axis, self.group)

    @property
    def row_type(self) -> QuantizedType:
        """The type for a tensor split into one row per group, with axis 0; without groups the type itself."""
        return self if self.group is None else replace(self, axis=0, group=None)

    def to_data(self) -> dict[str, Any]:
        """Return a dict of the fields, ``{"quant_min": -128, …}``, as files hold it; no ``group`` if it is None."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.group is None:
            del named["group"]
        return named

    @property
    def storage_dtype(self) -> torch.dtype:
        """The first of int8, uint8, int16, int32 and int64 that holds every code."""
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
            info = torch.iinfo(dtype)
            if info.min <= self.quant_min and self.quant_max <= info.max:
                return dtype
        return torch.int64

    @property
    def qscheme(self) -> torch.qscheme:
        """Symmetric or affine, per tensor or per channel (as which groups count), as ``torch.per_channel_affine``."""
        if self.axis is None:
            return torch.per_tensor_symmetric if self.symmetric else torch.per_tensor_affine
        return torch.per_channel_symmetric if self.symmetric else torch.per_channel_affine

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The quantized dtype, quint8, qint8 or qint32, that torch has for these codes.

        It is qint8 if there are negative codes and int8 holds all, quint8 if there are none and uint8 holds all, else
        qint32. None for floats, for groups, and for codes that int32 does not hold.
        """
        storage = self.storage_dtype
        if self.codes != "integer" or self.group is not None or storage == torch.int64:
            return None
        if self.signed:
            return torch.qint8 if storage == torch.int8 else torch.qint32
        return torch.quint8 if storage in (torch.int8, torch.uint8) else torch.qint32

    def with_axis(self, axis: int | None) -> QuantizedType:
        """Return a copy of the type, without groups, with one scale per index of ``axis`` (None: one per tensor)."""
        return replace(self, axis=axis, group=None)

    def with_codes(self, quant_min: int, quant_max: int) -> QuantizedType:
        """Return a copy of the type with these smallest and largest codes; ValueError if float codes have others."""
        return replace(self, quant_min=quant_min, quant_max=quant_max)


class WithQuantizedType:
    """Properties by which torch.ao and torchao ask an observer or a quantizer for its codes; all follow from ``qtype``.

    They are ``quant_min`` and ``quant_max``, the smallest and largest code, ``qscheme`` and ``ch_axis``.

    Attributes:
        qtype: the quantized type.
    """

    qtype: QuantizedType

    @property
    def quant_min(self) -> int:
        """Smallest code."""
        return self.qtype.quant_min

    @property
    def quant_max(self) -> int:
        """Largest code."""
        return self.qtype.quant_max

    @property
    def qscheme(self) -> torch.qscheme:
        """Symmetric or affine, per tensor or per channel (groups count as channels), as torch names it."""
        return self.qtype.qscheme

    @property
    def ch_axis(self) -> int:
        """The axis of the channels or groups; -1 also if there is one range or scale for the tensor."""
        return -1 if self.qtype.axis is None else self.qtype.axis


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


def type_from_arguments(
    dtype: torch.dtype | QuantizedType | str,
    qscheme: torch.qscheme | None,
    reduce_range: bool,
    quant_min: int | None,
    quant_max: int | None,
    ch_axis: int | None,
    rounding: Rounding | None,
) -> QuantizedType:
    """Return the :class:`QuantizedType` that torch.ao's observer arguments describe.

    Args:
        dtype: a torch dtype; or a QuantizedType or its name ("qint4"), which the other arguments mustn't contradict. A
            name says nothing about axis and rounding. Codes are no contradiction: they replace the type's own.
        qscheme: None: per tensor, affine; or what the QuantizedType or its name says.
        reduce_range: for a torch dtype of 8 bits, halve the smallest and largest code and round down, also those given
            by ``quant_min`` and ``quant_max``; other torch dtypes ignore it. It contradicts a QuantizedType or a name.
        quant_min: smallest code; None, with ``quant_max``: all codes of the dtype, or those of the QuantizedType.
        quant_max: largest code.
        ch_axis: axis of schemes per channel, and of a QuantizedType with one; else ignored. None: 0, or the type's own.
        rounding: None: "half_even", or that of the QuantizedType.

    Raises:
        TypeError: ``quant_min``, ``quant_max`` or ``ch_axis`` is no whole number.
        ValueError: an unsupported qscheme, dtype, name or rounding, a code range that is empty, half-given, wider than
            a torch dtype or not that of float codes, or arguments that contradict the QuantizedType or the name.
    """
    if (quant_min is None) != (quant_max is None):
        raise ValueError(f"quant_min and quant_max go together, got {quant_min} and {quant_max}")
    if qscheme is not None and qscheme not in _QSCHEMES:
        raise ValueError(
            f"unsupported qscheme {qscheme}: zero points are integers here; known: {', '.join(map(str, _QSCHEMES))}"
        )
    axis = (ch_axis or 0) if qscheme in _PER_CHANNEL else None
    if isinstance(dtype, str):
        if dtype not in QUANTIZED_TYPES:
            raise ValueError(f"unknown quantized type {dtype!r}; known: {', '.join(QUANTIZED_TYPES)}")
        dtype = replace(QUANTIZED_TYPES[dtype], axis=axis, rounding=rounding or "half_even")
    if isinstance(dtype, QuantizedType):
        _check_agreement(dtype, qscheme, reduce_range, ch_axis, rounding)
        return dtype if quant_min is None or quant_max is None else dtype.with_codes(quant_min, quant_max)
    signed = dtype in _SIGNED_DTYPES
    if not signed and dtype not in _UNSIGNED_DTYPES:
        known = ", ".join(map(str, (*_SIGNED_DTYPES, *_UNSIGNED_DTYPES)))
        raise ValueError(f"dtype must be one of {known}, a QuantizedType or its name, got {dtype}")
    full = QuantizedType.of(_SIGNED_DTYPES[dtype] if signed else _UNSIGNED_DTYPES[dtype], signed=signed)
    low, high = (full.quant_min, full.quant_max) if quant_min is None or quant_max is None else (quant_min, quant_max)
    if low < full.quant_min or high > full.quant_max:
        raise ValueError(
            f"quant_min..quant_max = {low}..{high} does not fit {dtype} ({full.quant_min}..{full.quant_max})"
        )
    if reduce_range and full.bits == _REDUCIBLE_BITS:
        low, high = low // 2, high // 2
    return QuantizedType(low, high, qscheme in _SYMMETRIC, axis, rounding or "half_even")


def _check_agreement(
    qtype: QuantizedType,
    qscheme: torch.qscheme | None,
    reduce_range: bool,
    ch_axis: int | None,
    rounding: Rounding | None,
) -> None:
    """Raise ValueError if an argument contradicts ``qtype``, which the user gave as dtype, or named.

    None and False agree with any.
    """
    if qscheme is not None and (qscheme in _PER_CHANNEL) != (qtype.axis is not None):
        raise ValueError(
            f"qscheme={qscheme} contradicts dtype={qtype}: give the type an axis (with_axis), or name it by a string"
            if qtype.axis is None
            else f"qscheme={qscheme} contradicts dtype={qtype}, which has an axis"
        )
    if qscheme is not None and (qscheme in _SYMMETRIC) != qtype.symmetric:
        raise ValueError(f"qscheme={qscheme} contradicts dtype={qtype}, whose symmetric is {qtype.symmetric}")
    if ch_axis is not None and qtype.axis is not None and ch_axis != qtype.axis:
        raise ValueError(f"ch_axis={ch_axis} contradicts dtype={qtype}")
    if reduce_range:
        raise ValueError(
            f"reduce_range=True contradicts dtype={qtype}, which says its codes; make a type of fewer codes"
        )
    if rounding is not None and rounding != qtype.rounding:
        raise ValueError(f"rounding={rounding!r} contradicts dtype={qtype}")
