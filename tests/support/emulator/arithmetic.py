"""Arithmetic of integers and floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emulator.faults import EmulatorError
from emulator.ptx import Instruction
from emulator.threads import Threads
from emulator.words import SIGNED, UNSIGNED, Words, decode, encode, halves, is_float, joined, width

# Veltkamp's factor for float64: splits a number into two halves whose products are exact.
_SPLIT = float(2**27 + 1)

_SIMPLE: dict[str, Callable[..., Words]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "abs": np.abs,
}


def fused_multiply_add(a: Words, b: Words, c: Words) -> Words:
    """Return ``a * b + c``, rounded once; in float64 the last bit is rarely rounded twice."""
    if a.dtype == np.float64:
        product = a * b
        high_a, high_b = (value * _SPLIT - (value * _SPLIT - value) for value in (a, b))
        low_a, low_b = a - high_a, b - high_b
        lost = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
        total = product + c
        fused = total + (_lost_in_sum(product, c, total) + lost)
        return np.where(np.isfinite(fused), fused, total)
    # The product is exact in float64. Rounding the sum to odd keeps the second rounding from going wrong.
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    lost = _lost_in_sum(product, addend, total)
    bits = total.view(np.int64)
    inexact = (lost != 0) & np.isfinite(total) & (bits & 1 == 0)
    odd = (bits + np.where((lost > 0) == (total > 0), 1, -1)).view(np.float64)
    return np.where(inexact, odd, total).astype(a.dtype)


def _lost_in_sum(a: Words, b: Words, total: Words) -> Words:
    """Return what rounding took from ``total = a + b`` (Knuth)."""
    part = total - a
    return (a - (total - part)) + (b - part)


def _floats(threads: Threads, instruction: Instruction, which: Words) -> None:
    type_name = instruction.type_name
    operands = [instruction.register(index) for index in range(1, len(instruction.operands))]
    if type_name in ("f16x2", "bf16x2"):
        element = type_name[:-2]
        pairs = zip(*(halves(threads.words(operand, 32, which)) for operand in operands), strict=True)
        low, high = (encode(_float(instruction, [decode(w, element) for w in pair]), element) for pair in pairs)
        threads.write(instruction.register(0), joined(low, high), which)
        return
    values = [threads.values(operand, type_name, which) for operand in operands]
    threads.put(instruction.register(0), _float(instruction, values), type_name, which)


def _float(instruction: Instruction, values: list[Words]) -> Words:
    name, modifiers = instruction.name, instruction.modifiers
    if name == "ex2":
        # The only approximation that kernels use; here it is exact to the last bit, on GPUs to about two.
        return np.exp2(values[0].astype(np.float64)).astype(values[0].dtype)
    if "ftz" in modifiers or "approx" in modifiers or "full" in modifiers or "sat" in modifiers:
        raise EmulatorError("arithmetic that is not IEEE's")
    if name in _SIMPLE:
        return _SIMPLE[name](*values)
    if name in ("fma", "mad"):
        return fused_multiply_add(*values)
    if name == "div":
        return values[0] / values[1]
    if name == "sqrt":
        return np.sqrt(values[0])
    if name == "rcp":
        return 1 / values[0]
    propagates = "NaN" in modifiers
    if name == "min":
        return (np.minimum if propagates else np.fmin)(*values)
    if name == "max":
        return (np.maximum if propagates else np.fmax)(*values)
    raise EmulatorError("unknown float instruction")


def _integers(threads: Threads, instruction: Instruction, which: Words) -> None:
    type_name = instruction.type_name
    bits, signed = width(type_name), type_name[0] == "s"
    values = [
        threads.values(instruction.register(index), type_name, which) for index in range(1, len(instruction.operands))
    ]
    name = instruction.name
    if name in ("mul", "mad"):
        result = _product(threads, instruction, values[:2], which)
    elif name in _SIMPLE:
        result = _SIMPLE[name](*values)
    elif name in ("min", "max"):
        result = (np.minimum if name == "min" else np.maximum)(*values)
    elif name in ("div", "rem"):
        result = _quotient(name, *values)
    else:
        raise EmulatorError("unknown integer instruction")
    target = SIGNED if signed else UNSIGNED
    wide = 2 * bits if "wide" in instruction.modifiers else bits
    threads.write(instruction.register(0), result.astype(target[wide], copy=False), which)


def _product(threads: Threads, instruction: Instruction, factors: list[Words], which: Words) -> Words:
    """Return low half, high half or whole of a product, and ``mad``'s sum with a third operand."""
    type_name = instruction.type_name
    bits, kinds = width(type_name), SIGNED if type_name[0] == "s" else UNSIGNED
    if "wide" in instruction.modifiers:
        result = factors[0].astype(kinds[2 * bits]) * factors[1].astype(kinds[2 * bits])
        sum_type = f"{type_name[0]}{2 * bits}"
    elif "hi" in instruction.modifiers:
        result, sum_type = _high_product(*factors), type_name
    else:
        result, sum_type = factors[0] * factors[1], type_name
    if instruction.name == "mad":
        result = result + threads.values(instruction.register(3), sum_type, which)
    return result


def _high_product(a: Words, b: Words) -> Words:
    bits = 8 * a.dtype.itemsize
    exact = a.astype(object) * b.astype(object) >> bits
    return exact.astype(a.dtype)


def _quotient(name: str, a: Words, b: Words) -> Words:
    """Return division towards zero, or its remainder. By zero it is not defined: all ones here, as on GPUs."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    remainder = np.fmod(a, safe)
    result = remainder if name == "rem" else (a - remainder) // safe
    return np.where(b == 0, np.array(-1).astype(a.dtype), result)


def _arithmetic(threads: Threads, instruction: Instruction, which: Words) -> None:
    (_floats if is_float(instruction.type_name) else _integers)(threads, instruction, which)


TABLE = dict.fromkeys(
    ("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs", "sqrt", "rcp", "ex2"), _arithmetic
)
