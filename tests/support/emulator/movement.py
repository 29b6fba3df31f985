"""Moves between registers, and to and from memory."""

from __future__ import annotations

import numpy as np

from emulator.faults import EmulatorError
from emulator.memory import check_aligned
from emulator.ptx import Instruction
from emulator.threads import Threads
from emulator.words import UNSIGNED, Words, resized, width

# Generic addresses from here on are of local memory, below of global memory.
_LOCAL = 1 << 62
# Bytes of an asynchronous copy that are moved together.
_CHUNK = 4


def _mov(threads: Threads, instruction: Instruction, which: Words) -> None:
    bits = width(instruction.type_name)
    target, source = instruction.operands
    if isinstance(target, tuple):
        words, part = threads.words(instruction.register(1), bits, which), bits // len(target)
        for place, register in enumerate(target):
            piece = words >> UNSIGNED[bits](place * part) & UNSIGNED[bits]((1 << part) - 1)
            threads.write(register, resized(piece, part), which)
    elif isinstance(source, tuple):
        part, words = bits // len(source), np.zeros(len(which), UNSIGNED[bits])
        for place, register in enumerate(source):
            words |= threads.words(register, part, which).astype(UNSIGNED[bits]) << UNSIGNED[bits](place * part)
        threads.write(instruction.register(0), words, which)
    else:
        threads.write(instruction.register(0), threads.words(instruction.register(1), bits, which), which)


def _space(instruction: Instruction) -> str:
    for space in ("global", "shared", "local", "param"):
        if space in instruction.modifiers:
            return space
    return "generic"


def _ld(threads: Threads, instruction: Instruction, which: Words) -> None:
    type_name, space = instruction.type_name, _space(instruction)
    bits = width(type_name)
    registers = instruction.registers(0)
    if space == "param":
        number = threads.parameters[instruction.address(1).base]
        threads.write(registers[0], np.full(len(which), number % (1 << bits), UNSIGNED[bits]), which)
        return
    size = bits // 8
    addresses = threads.addresses(instruction.address(1), 32 if space == "shared" else 64, which)
    check_aligned(addresses, size * len(registers), f"{space} load")
    for place, register in enumerate(registers):
        words = load(threads, space, addresses + addresses.dtype.type(place * size), size, which)
        threads.put_extended(register, words, type_name, which)


def _st(threads: Threads, instruction: Instruction, which: Words) -> None:
    bits, space = width(instruction.type_name), _space(instruction)
    size, registers = bits // 8, instruction.registers(1)
    addresses = threads.addresses(instruction.address(0), 32 if space == "shared" else 64, which)
    check_aligned(addresses, size * len(registers), f"{space} store")
    for place, register in enumerate(registers):
        words = threads.words(register, bits, which)
        store(threads, space, addresses + addresses.dtype.type(place * size), words, size, which)


def load(threads: Threads, space: str, addresses: Words, size: int, which: Words) -> Words:
    """Return words that threads read from one space, one each."""
    space, addresses = _resolved(space, addresses)
    if space == "local":
        return threads.local.load(which, addresses, size)
    threads.record(space, "read", addresses, size, which, None)
    if space == "global":
        return threads.memory.load(addresses, size)
    return threads.shared.load(threads.block[which], addresses, size)


def store(threads: Threads, space: str, addresses: Words, words: Words, size: int, which: Words) -> None:
    """Write words to one space, one a thread."""
    space, addresses = _resolved(space, addresses)
    if space == "local":
        threads.local.store(which, addresses, words, size)
        return
    threads.record(space, "write", addresses, size, which, words)
    if space == "global":
        threads.memory.store(addresses, words, size)
    else:
        threads.shared.store(threads.block[which], addresses, words, size)


def _resolved(space: str, addresses: Words) -> tuple[str, Words]:
    """Return the memory that generic addresses are of, and the addresses in it; those of other spaces as they are.

    Raises:
        EmulatorError: some are of global and some of local memory.
    """
    if space != "generic":
        return space, addresses
    is_local = addresses >= np.uint64(_LOCAL)
    if is_local.any() and not is_local.all():
        raise EmulatorError("generic addresses of two memories")
    return ("local", addresses - np.uint64(_LOCAL)) if is_local.all() else ("global", addresses)


def _cvta(threads: Threads, instruction: Instruction, which: Words) -> None:
    """``cvta.local`` and ``cvta.global``: from an address in one memory to a generic one."""
    if "to" in instruction.modifiers or not {"local", "global"} & set(instruction.modifiers):
        raise EmulatorError("an unknown conversion of addresses")
    base = np.uint64(_LOCAL if "local" in instruction.modifiers else 0)
    threads.write(instruction.register(0), threads.words(instruction.register(1), 64, which) + base, which)


def _atomic(threads: Threads, instruction: Instruction, which: Words) -> None:
    type_name, space = instruction.type_name, _space(instruction)
    if "add" not in instruction.modifiers or type_name[0] not in "us":
        raise EmulatorError("an atomic that is no sum of integers")
    if space not in ("global", "shared"):
        raise EmulatorError("an atomic in a memory that is not known")
    bits, returns = width(type_name), instruction.name == "atom"
    size = bits // 8
    addresses = threads.addresses(instruction.address(int(returns)), 32 if space == "shared" else 64, which)
    words = threads.words(instruction.register(1 + int(returns)), bits, which)
    threads.record(space, "atomic", addresses, size, which, None)
    if space == "global":
        before = threads.memory.add_atomically(addresses, words, size)
    else:
        before = threads.shared.add_atomically(threads.block[which], addresses, words, size)
    if returns:
        threads.write(instruction.register(0), before, which)


def _cp(threads: Threads, instruction: Instruction, which: Words) -> None:
    """``cp.async``: done at once, which no correct kernel notices; what is beyond the source's size becomes zero."""
    if "commit_group" in instruction.modifiers or "wait_group" in instruction.modifiers:
        return
    if instruction.modifiers[0] != "async" or "bulk" in instruction.modifiers:
        raise EmulatorError("an unknown copy")
    target = threads.addresses(instruction.address(0), 32, which)
    source = threads.addresses(instruction.address(1), 64, which)
    size = int(instruction.register(2), 0)
    available = np.full(len(which), size)
    if len(instruction.operands) > 3:
        available = threads.words(instruction.register(3), 32, which).astype(np.int64)
    check_aligned(target, size, "shared store")
    check_aligned(source[available > 0], size, "global load")
    for place in range(0, size, _CHUNK):
        inside = available > place
        words = np.zeros(len(which), np.uint32)
        if inside.any():
            words[inside] = load(threads, "global", source[inside] + np.uint64(place), _CHUNK, which[inside])
        store(threads, "shared", target + np.uint32(place), words, _CHUNK, which)


TABLE = {"mov": _mov, "ld": _ld, "st": _st, "atom": _atomic, "red": _atomic, "cp": _cp, "cvta": _cvta}
