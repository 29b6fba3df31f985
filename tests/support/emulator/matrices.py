"""Matrix units of sm_80, and the moves of their operands between shared memory and registers."""

from __future__ import annotations

import re

import numpy as np

from emulator.faults import EmulatorError
from emulator.memory import check_aligned
from emulator.movement import load, store
from emulator.ptx import Instruction
from emulator.threads import WARP, Threads
from emulator.words import Words, decode, halves, joined

_SHAPE = re.compile(r"m16n8k(\d+)")
_ROWS, _COLS = 16, 8
_LANES = np.arange(WARP)
# In a fragment, lane ``4 g + q`` holds elements of row (or column) g, beginning at column (or row) q.
_GROUP, _QUARTER = _LANES // 4, _LANES % 4
# Bits of a float32 that tf32 leaves out.
_TF32 = np.uint32(0xFFFFE000)


def _tiles(instruction: Instruction) -> int:
    return next(int(modifier[1:]) for modifier in instruction.modifiers if modifier in ("x1", "x2", "x4"))


def _ldmatrix(threads: Threads, instruction: Instruction, which: Words) -> None:
    """Load 8 × 8 tiles of 16 bits: lane i gives the address of a row, and receives two neighbours of row ``i / 4``."""
    addresses = threads.warps(threads.addresses(instruction.address(1), 32, which), which)
    lanes = threads.warps(which, which)
    for number, register in zip(range(_tiles(instruction)), instruction.registers(0), strict=True):
        owners = slice(8 * number, 8 * number + 8)
        rows, readers = addresses[:, owners].reshape(-1), lanes[:, owners].reshape(-1)
        check_aligned(rows, 16, "shared load of a row")
        columns = [load(threads, "shared", rows + np.uint32(2 * place), 2, readers) for place in range(8)]
        tile = np.stack(columns, axis=1).reshape(-1, 8, 8)
        if "trans" in instruction.modifiers:
            tile = tile.transpose(0, 2, 1)
        low, high = tile[:, _GROUP, 2 * _QUARTER], tile[:, _GROUP, 2 * _QUARTER + 1]
        threads.write(register, joined(low, high).reshape(-1), which)


def _stmatrix(threads: Threads, instruction: Instruction, which: Words) -> None:
    """Inverse of :func:`_ldmatrix`."""
    addresses = threads.warps(threads.addresses(instruction.address(0), 32, which), which)
    lanes = threads.warps(which, which)
    for number, register in zip(range(_tiles(instruction)), instruction.registers(1), strict=True):
        low, high = halves(threads.warps(threads.words(register, 32, which), which))
        tile = np.zeros((len(low), 8, 8), np.uint16)
        tile[:, _GROUP, 2 * _QUARTER], tile[:, _GROUP, 2 * _QUARTER + 1] = low, high
        if "trans" in instruction.modifiers:
            tile = tile.transpose(0, 2, 1)
        owners = slice(8 * number, 8 * number + 8)
        rows, writers = addresses[:, owners].reshape(-1), lanes[:, owners].reshape(-1)
        check_aligned(rows, 16, "shared store of a row")
        flat = np.ascontiguousarray(tile).reshape(-1, 8)
        for place in range(8):
            store(threads, "shared", rows + np.uint32(2 * place), flat[:, place], 2, writers)


def _elements(words: Words, type_name: str) -> list[Words]:
    """Return the values that a 32-bit register holds, the lowest bits first."""
    if type_name in ("f16", "bf16"):
        return [decode(half, type_name).astype(np.float64) for half in halves(words)]
    if type_name == "tf32":
        return [(words & _TF32).view(np.float32).astype(np.float64)]
    if type_name in ("s8", "u8"):
        kind = np.int8 if type_name == "s8" else np.uint8
        return [(words >> np.uint32(8 * place)).astype(np.uint8).view(kind).astype(np.int64) for place in range(4)]
    raise EmulatorError(f"matrices of {type_name}")


def _mma(threads: Threads, instruction: Instruction, which: Words) -> None:
    """``D = A B + C`` of 16 × k, k × 8 and 16 × 8. Floats are summed in float64; matrix units round otherwise."""
    shape = next((found for m in instruction.modifiers if (found := _SHAPE.fullmatch(m))), None)
    result_type, a_type, b_type, _ = instruction.modifiers[-4:]
    if shape is None or result_type not in ("f32", "s32"):
        raise EmulatorError("an unknown shape or type of matrices")
    inner, is_integer = int(shape.group(1)), result_type == "s32"
    dtype = np.int64 if is_integer else np.float64

    def rows(register: str) -> Words:
        return threads.warps(threads.words(register, 32, which), which)

    warps = len(which) // WARP
    a, b = np.zeros((warps, _ROWS, inner), dtype), np.zeros((warps, inner, _COLS), dtype)
    c = np.zeros((warps, _ROWS, _COLS), dtype)
    for number, register in enumerate(instruction.registers(1)):
        values = _elements(rows(register), a_type)
        for place, value in enumerate(values):
            a[:, _GROUP + 8 * (number % 2), len(values) * (_QUARTER + 4 * (number // 2)) + place] = value
    for number, register in enumerate(instruction.registers(2)):
        values = _elements(rows(register), b_type)
        for place, value in enumerate(values):
            b[:, len(values) * (_QUARTER + 4 * number) + place, _GROUP] = value
    for number, register in enumerate(instruction.registers(3)):
        c[:, _GROUP + 8 * (number // 2), 2 * _QUARTER + number % 2] = decode(rows(register), result_type)
    total = a @ b + c
    if is_integer and "satfinite" in instruction.modifiers:
        total = total.clip(-(2**31), 2**31 - 1)
    for number, register in enumerate(instruction.registers(0)):
        part = total[:, _GROUP + 8 * (number // 2), 2 * _QUARTER + number % 2]
        words = part.astype(np.int32 if is_integer else np.float32).view(np.uint32)
        threads.write(register, words.reshape(-1), which)


TABLE = {"ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "mma": _mma}
