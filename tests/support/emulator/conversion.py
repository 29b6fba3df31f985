"""Conversions between types."""

from __future__ import annotations

import numpy as np

from emulator.faults import EmulatorError
from emulator.ptx import Instruction
from emulator.threads import Threads
from emulator.words import SIGNED, UNSIGNED, Words, encode, is_float, joined, width

_ROUNDINGS = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}
_SMALLEST_NORMAL = np.float32(1.17549435e-38)


def _cvt(threads: Threads, instruction: Instruction, which: Words) -> None:
    *modifiers, target, source = instruction.modifiers
    register = instruction.register(0)
    if "sat" in modifiers or "relu" in modifiers:
        raise EmulatorError("a conversion that clips")
    if target in ("f16x2", "bf16x2"):
        high, low = (encode(threads.values(instruction.register(i), "f32", which), target[:-2]) for i in (1, 2))
        threads.write(register, joined(low, high), which)
        return
    values = threads.values(instruction.register(1), source, which)
    if "ftz" in modifiers and source == "f32":
        values = np.where(np.abs(values) < _SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)
    rounding = next((_ROUNDINGS[modifier] for modifier in modifiers if modifier in _ROUNDINGS), None)
    if is_float(target):
        if rounding is not None:
            values = rounding(values)
        elif not is_float(source) and target != "f64":
            values = values.astype(np.float32 if target == "f32" else np.float64)
        threads.put(register, values, target, which)
    elif is_float(source):
        if rounding is None:
            raise EmulatorError("a conversion to integers without a rounding")
        threads.put_extended(register, _saturated(rounding(values.astype(np.float64)), target), target, which)
    else:
        bits = width(target)
        widened = values.astype(np.int64).view(np.uint64) if source[0] == "s" else values.astype(np.uint64)
        threads.put_extended(register, widened.astype(UNSIGNED[bits]), target, which)


def _saturated(whole: Words, target: str) -> Words:
    """Return words of whole floats, clipped to the integer type; NaN becomes 0."""
    bits = width(target)
    kind = (SIGNED if target[0] == "s" else UNSIGNED)[bits]
    bounds = np.iinfo(kind)
    above, below = whole >= float(bounds.max), whole <= float(bounds.min)
    inside = np.where(above | below | np.isnan(whole), 0, whole).astype(kind)
    return np.where(above, kind(bounds.max), np.where(below, kind(bounds.min), inside)).view(UNSIGNED[bits])


TABLE = {"cvt": _cvt}
