"""Floating point formats of few bits, and formats that scale blocks of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

FloatCodes = Literal["e4m3", "e5m2", "e2m3", "e3m2", "e2m1"]
CodeSet = Literal["integer", FloatCodes]
ScaleFormat = Literal["e8m0", "e4m3"]
ScaleRounding = Literal["floor", "ceil"]


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating point format with subnormal numbers.

    ``value = (-1)^sign * 2^(max(exponent, 1) - bias) * (mantissa / 2^mantissa_bits + (exponent > 0))``, where sign,
    exponent and mantissa are a code's fields as unsigned integers.

    Attributes:
        exponent_bits: number of bits of the exponent, whose bias is ``2^(exponent_bits - 1) - 1``.
        mantissa_bits: number of bits of the mantissa.
        largest: the largest finite value, to which larger ones saturate, infinity too.

    Source: OCP 8-bit Floating Point Specification (OFP8) 1.0; OCP Microscaling Formats (MX) Specification 1.0.

    Examples:
        >>> e4m3 = FLOAT_FORMATS["e4m3"]
        >>> e4m3.bits, e4m3.largest, e4m3.least_exponent, e4m3.largest_code
        (8, 448.0, -6, 126)
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def bits(self) -> int:
        """Number of bits of a code, its sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def least_exponent(self) -> int:
        """Exponent of the smallest normal number and of all subnormal ones, ``1 - bias``: -6 for E4M3."""
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def greatest_exponent(self) -> int:
        """Exponent e of the largest finite value, ``2^e · f`` with ``1 <= f < 2``: 8 for E4M3, whose largest is 448."""
        return math.frexp(self.largest)[1] - 1

    @property
    def overflow(self) -> float:
        """The number that would follow ``largest``: 480 for E4M3. Values that round to it, or lie beyond, saturate."""
        return self.largest + math.ldexp(1.0, self.greatest_exponent - self.mantissa_bits)

    @property
    def largest_code(self) -> int:
        """Code of the largest finite value: its exponent and mantissa bits as an integer, 126 for E4M3."""
        exponent = self.greatest_exponent - self.least_exponent
        return int(math.ldexp(exponent + math.ldexp(self.largest, -self.greatest_exponent), self.mantissa_bits))


# E4M3 has no infinities (the "FN" of other libraries' names); those of E5M2 are not reached in saturating mode.
FLOAT_FORMATS: dict[FloatCodes, FloatFormat] = {
    "e4m3": FloatFormat(4, 3, 448.0),
    "e5m2": FloatFormat(5, 2, 57344.0),
    "e2m3": FloatFormat(2, 3, 7.5),
    "e3m2": FloatFormat(3, 2, 28.0),
    "e2m1": FloatFormat(2, 1, 6.0),
}

# Formats of single elements, by the names that users give: fp8_e4m3 and the like.
ELEMENT_FORMATS: dict[str, FloatCodes] = {f"fp{number.bits}_{name}": name for name, number in FLOAT_FORMATS.items()}


@dataclass(frozen=True)
class BlockFormat:
    """A format whose blocks of consecutive elements have one scale each, found from the elements themselves.

    Attributes:
        elements: name of the elements' format in :data:`FLOAT_FORMATS`.
        size: number of elements of a block; the last block of an axis may have fewer.
        scale: ``"e8m0"``, a power of two from 2^-127 to 2^127; ``"e4m3"``, a float of 8 bits, times one float32 scale
            for the whole tensor.
        scale_rounding: of an ``"e8m0"`` scale. ``"floor"``: the block's largest element, divided by the scale, has the
            greatest exponent of the elements' format, and saturates where its mantissa is too large. ``"ceil"``: the
            smallest power of two with which no element saturates.

    Raises:
        ValueError: an unknown format, scale or rounding, a size that is no power of two, or ``"ceil"`` for a scale that
            is no power of two.

    Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.2 and 6.3; ``"ceil"``: Mishra et al., Recipes
    for Pre-training LLMs with MXFP8, 2025; NVFP4: NVIDIA Transformer Engine.
    """

    elements: FloatCodes
    size: int
    scale: ScaleFormat = "e8m0"
    scale_rounding: ScaleRounding = "floor"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("elements", self.elements, tuple(FLOAT_FORMATS)),
            ("scale", self.scale, get_args(ScaleFormat)),
            ("scale_rounding", self.scale_rounding, get_args(ScaleRounding)),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if self.size < 1 or self.size & (self.size - 1):
            raise ValueError(f"the size of a block must be a power of two, got {self.size}")
        if self.scale != "e8m0" and self.scale_rounding != "floor":
            raise ValueError(f"scale_rounding is of e8m0 scales; {self.scale} scales are rounded to nearest")

    @property
    def element_format(self) -> FloatFormat:
        """The :class:`FloatFormat` of the elements."""
        return FLOAT_FORMATS[self.elements]


BLOCK_FORMATS: dict[str, BlockFormat] = {
    "mxfp8": BlockFormat("e4m3", 32),
    "mxfp8_e4m3": BlockFormat("e4m3", 32),
    "mxfp8_e5m2": BlockFormat("e5m2", 32),
    "mxfp6_e2m3": BlockFormat("e2m3", 32),
    "mxfp6_e3m2": BlockFormat("e3m2", 32),
    "mxfp4": BlockFormat("e2m1", 32),
    "nvfp4": BlockFormat("e2m1", 16, "e4m3"),
}
