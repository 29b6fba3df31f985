"""Comparisons, selections, bits and shifts."""

from __future__ import annotations

import numpy as np

from emulator.faults import EmulatorError
from emulator.ptx import Instruction
from emulator.threads import Threads
from emulator.words import UNSIGNED, Words, decode, halves, is_float, width

# Unordered comparisons hold for NaN too; "lo" and the like compare unsigned integers.
_COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_BITWISE = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}


def compare(comparison: str, a: Words, b: Words, floats: bool) -> Words:
    """Apply a comparison of ``setp``."""
    if not floats:
        return np.asarray(_COMPARISONS[comparison](a, b))
    unordered = np.isnan(a) | np.isnan(b)
    if comparison in ("num", "nan"):
        return unordered if comparison == "nan" else ~unordered
    if comparison.endswith("u"):
        return np.asarray(_COMPARISONS[comparison[:-1]](a, b) | unordered)
    return np.asarray(_COMPARISONS[comparison](a, b) & ~unordered)


def _setp(threads: Threads, instruction: Instruction, which: Words) -> None:
    comparison, type_name = instruction.modifiers[0], instruction.type_name
    if len([m for m in instruction.modifiers if m != "ftz"]) != 2:
        raise EmulatorError("setp that combines predicates")
    targets = instruction.register(0).split("|")
    a, b = instruction.register(1), instruction.register(2)
    if type_name in ("f16x2", "bf16x2"):
        pairs = zip(halves(threads.words(a, 32, which)), halves(threads.words(b, 32, which)), strict=True)
        results = [compare(comparison, *(decode(half, type_name[:-2]) for half in pair), True) for pair in pairs]
        for target, result in zip(targets, results, strict=True):
            threads.write(target, result, which)
        return
    values = (threads.values(operand, type_name, which) for operand in (a, b))
    result = compare(comparison, *values, is_float(type_name))
    threads.write(targets[0], result, which)
    if len(targets) > 1:
        threads.write(targets[1], ~result, which)


def _selp(threads: Threads, instruction: Instruction, which: Words) -> None:
    bits = width(instruction.type_name)
    chosen = threads.words(instruction.register(3), 1, which)
    a, b = (threads.words(instruction.register(index), bits, which) for index in (1, 2))
    threads.write(instruction.register(0), np.where(chosen, a, b), which)


def _bitwise(threads: Threads, instruction: Instruction, which: Words) -> None:
    bits = width(instruction.type_name)
    operands = [
        threads.words(instruction.register(index), bits, which) for index in range(1, len(instruction.operands))
    ]
    result = ~operands[0] if instruction.name == "not" else _BITWISE[instruction.name](*operands)
    threads.write(instruction.register(0), result, which)


def _shift(threads: Threads, instruction: Instruction, which: Words) -> None:
    type_name = instruction.type_name
    bits = width(type_name)
    signed = type_name[0] == "s"
    values = threads.values(instruction.register(1), type_name if signed else f"u{bits}", which)
    by = threads.words(instruction.register(2), 32, which)
    within = np.minimum(by, bits - 1).astype(values.dtype)
    if instruction.name == "shl":
        values = values.view(UNSIGNED[bits])
        result = np.where(by >= bits, 0, values << within.astype(values.dtype))
    else:
        # A signed value that is shifted out leaves its sign.
        result = values >> within
        result = result if signed else np.where(by >= bits, 0, result)
    threads.write(instruction.register(0), result.astype(values.dtype), which)


def _extract(threads: Threads, instruction: Instruction, which: Words) -> None:
    type_name = instruction.type_name
    bits = width(type_name)
    position, length = int(instruction.register(2), 0), int(instruction.register(3), 0)
    word = UNSIGNED[bits]
    field = (threads.words(instruction.register(1), bits, which) >> word(position)) & word((1 << length) - 1)
    if type_name[0] == "s":
        field = np.where(field >> word(length - 1) & word(1), field | word((1 << bits) - (1 << length)), field)
    threads.write(instruction.register(0), field, which)


def _insert(threads: Threads, instruction: Instruction, which: Words) -> None:
    bits = width(instruction.type_name)
    field, into = (threads.words(instruction.register(index), bits, which) for index in (1, 2))
    position, length = int(instruction.register(3), 0), int(instruction.register(4), 0)
    word = UNSIGNED[bits]
    mask = word(((1 << length) - 1) << position)
    threads.write(instruction.register(0), (into & ~mask) | ((field << word(position)) & mask), which)


def _count_bits(threads: Threads, instruction: Instruction, which: Words) -> None:
    words = threads.words(instruction.register(1), width(instruction.type_name), which)
    threads.write(instruction.register(0), np.bitwise_count(words).astype(np.uint32), which)


def _permute(threads: Threads, instruction: Instruction, which: Words) -> None:
    low, high, selector = (threads.words(instruction.register(index), 32, which) for index in (1, 2, 3))
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    result = np.zeros(len(which), np.uint32)
    for place in range(4):
        select = (selector >> np.uint32(4 * place)) & np.uint32(0xF)
        byte = (both >> (np.uint64(8) * (select & np.uint32(7)).astype(np.uint64))).astype(np.uint32) & np.uint32(0xFF)
        # The fourth bit asks for the byte's sign instead.
        byte = np.where(select & 8, np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0)), byte)
        result |= byte << np.uint32(8 * place)
    threads.write(instruction.register(0), result, which)


def _table_of_three(threads: Threads, instruction: Instruction, which: Words) -> None:
    a, b, c = (threads.words(instruction.register(index), 32, which) for index in (1, 2, 3))
    table = int(instruction.register(4), 0)
    result = np.zeros(len(which), np.uint32)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    threads.write(instruction.register(0), result, which)


TABLE = {
    "setp": _setp,
    "selp": _selp,
    **dict.fromkeys(("and", "or", "xor", "not"), _bitwise),
    **dict.fromkeys(("shl", "shr"), _shift),
    "bfe": _extract,
    "bfi": _insert,
    "popc": _count_bits,
    "prmt": _permute,
    "lop3": _table_of_three,
}
