"""Registers hold words of bits; instructions read them as integers or floats of their type, ``"s32"`` or ``"bf16"``."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[Any]

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS: dict[int, Any] = {16: np.float16, 32: np.float32, 64: np.float64}

_SPECIAL_WIDTHS = {"pred": 1, "f16x2": 32, "bf16x2": 32, "tf32": 32, "bf16": 16}
# What a conversion of NaN to 16 bits gives.
_NAN_16 = np.uint16(0x7FFF)


@cache
def width(type_name: str) -> int:
    """Return bits of a type; 1 for predicates."""
    return _SPECIAL_WIDTHS.get(type_name) or int(type_name[1:])


@cache
def is_float(type_name: str) -> bool:
    """Whether values of the type are floats."""
    return type_name[0] == "f" or type_name in ("bf16", "bf16x2", "tf32")


def decode(words: Words, type_name: str) -> Words:
    """Return the values of unsigned words: integers, floats, or bfloat16 as float32."""
    if type_name == "bf16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type_name[0] == "s":
        return words.view(SIGNED[width(type_name)])
    if type_name[0] == "f" and type_name != "f16x2":
        return words.view(FLOATS[width(type_name)])
    return words


def encode(values: Words, type_name: str) -> Words:
    """Return inverse of :func:`decode`; rounds floats to nearest even, wraps integers around."""
    if type_name == "bf16":
        return float32_to_bfloat16(values.astype(np.float32, copy=False))
    if type_name == "f16":
        return float_to_float16(values)
    bits = width(type_name)
    if type_name[0] == "f":
        return values.astype(FLOATS[bits], copy=False).view(UNSIGNED[bits])
    return values.astype(UNSIGNED[bits], copy=False)


def float32_to_bfloat16(values: Words) -> Words:
    """Return words of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint64(16)).astype(
        np.uint16
    )
    return np.where(np.isnan(values), _NAN_16, rounded)


def float_to_float16(values: Words) -> Words:
    """Return words of float16, rounded to nearest even."""
    with np.errstate(over="ignore"):
        return np.where(np.isnan(values), _NAN_16, values.astype(np.float16).view(np.uint16))


def halves(words: Words) -> tuple[Words, Words]:
    """Return low and high 16 bits of 32-bit words."""
    return (words & np.uint32(0xFFFF)).astype(np.uint16), (words >> np.uint32(16)).astype(np.uint16)


def joined(low: Words, high: Words) -> Words:
    """Return 32-bit words of two of 16 bits."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def resized(words: Words, bits: int) -> Words:
    """Return words cut, or filled with zeros, to ``bits``."""
    return words.astype(UNSIGNED[bits], copy=False)
