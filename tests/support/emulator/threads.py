"""The threads of a launch: their registers, the memory that they reach, and what they did to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from emulator.faults import EmulatorError
from emulator.memory import GlobalMemory, OwnMemory
from emulator.ptx import Address, Program
from emulator.races import AccessLog
from emulator.words import UNSIGNED, Words, decode, encode, resized, width

WARP = 32
# What a register holds that no instruction wrote: compilers leave some of them undefined.
_POISON = 0xA5A5A5A5A5A5A5A5
_AXES = "xyz"


@dataclass(frozen=True)
class Launch:
    """What one launch of a kernel is given.

    Attributes:
        program: the kernel.
        grid: blocks along each axis.
        parameters: word of each parameter.
        shared_bytes: shared memory of a block.
        memory: what the launch may touch.
    """

    program: Program
    grid: tuple[int, int, int]
    parameters: Mapping[str, int]
    shared_bytes: int
    memory: GlobalMemory


class Threads:
    """All threads of a launch, numbered block by block; an instruction works on the sorted numbers of some of them.

    Attributes:
        program: what they run.
        grid: blocks along each axis.
        per_block: threads of a block.
        count: threads of the launch.
        block: (count,) number of each thread's block.
        lane: (count,) place of each thread in its warp.
        memory: global memory.
        shared: shared memory of the blocks.
        local: local memory of the threads.
        log: of accesses, for races; None where they are not looked for.
        epoch: (blocks,) how many barriers each block has passed.
    """

    def __init__(self, launch: Launch, *, check_races: bool = True) -> None:
        self.program, self.grid, self.memory = launch.program, launch.grid, launch.memory
        self.per_block = self.program.threads
        self.blocks = self.grid[0] * self.grid[1] * self.grid[2]
        self.count = self.blocks * self.per_block
        numbers = np.arange(self.count)
        self.everyone = numbers
        self.block = numbers // self.per_block
        self.lane = numbers % WARP
        self.shared = OwnMemory("shared", self.blocks, launch.shared_bytes)
        self.local = OwnMemory("local", self.count, self.program.local_bytes)
        self.log = AccessLog(self.per_block) if check_races else None
        self.epoch = np.zeros(self.blocks, np.int64)
        self.parameters = launch.parameters
        self._registers: dict[str, Words] = {}
        self._constants: dict[tuple[str, int], Words] = {}
        self._special = self._special_registers()

    def words(self, operand: str, bits: int, threads: Words) -> Words:
        """Return the words of a register, special register or immediate, cut or filled to ``bits`` (1: bool)."""
        register = self._registers.get(operand)
        if register is None:
            if operand[0] != "%":
                return self._constant(operand, bits)[: len(threads)]
            register = self._special.get(operand)
            if register is None:
                register = self._unwritten(operand)
        found = register if len(threads) == self.count else register[threads]
        return found if bits == 1 else resized(found, bits)

    def values(self, operand: str, type_name: str, threads: Words) -> Words:
        """Return values of an operand, as its type says."""
        return decode(self.words(operand, width(type_name), threads), type_name)

    def write(self, register: str, words: Words, threads: Words) -> None:
        """Set a register; words are cut or filled with zeros to its width. ``_`` takes anything."""
        if register == "_":
            return
        target = self._registers.get(register)
        if target is None:
            bits = self.program.register_width(register)
            target = self._registers[register] = np.zeros(self.count, bool if bits == 1 else UNSIGNED[bits])
        if words.dtype.kind in "if":
            words = words.view(UNSIGNED[8 * words.dtype.itemsize])
        if len(threads) == self.count:
            target[...] = words
        else:
            target[threads] = words

    def put(self, register: str, values: Words, type_name: str, threads: Words) -> None:
        """Set a register to values of a type."""
        self.write(register, encode(values, type_name), threads)

    def put_extended(self, register: str, words: Words, type_name: str, threads: Words) -> None:
        """Set a register that may be wider than the type: signed integers fill it with their sign."""
        bits = self.program.register_width(register)
        if type_name[0] == "s" and bits > 8 * words.dtype.itemsize:
            words = decode(words, type_name).astype(np.int64).view(np.uint64)
        self.write(register, resized(words, bits), threads)

    def addresses(self, address: Address, bits: int, threads: Words) -> Words:
        """Return where each thread accesses memory."""
        if address.base == "global_smem":
            return np.full(len(threads), address.offset, UNSIGNED[bits])
        offset = UNSIGNED[bits](address.offset % (1 << bits))
        return self.words(address.base, bits, threads) + offset

    def record(self, space: str, kind: str, addresses: Words, size: int, threads: Words, words: Words | None) -> None:
        """Remember accesses for the search for races."""
        if self.log is not None:
            blocks = self.block[threads]
            self.log.add(space, kind, addresses, size, threads, blocks, self.epoch[blocks], words)

    def of_whole_blocks(self, threads: Words) -> Words:
        """Return those of the threads whose block is complete among them."""
        blocks, counts = np.unique(self.block[threads], return_counts=True)
        return threads[np.isin(self.block[threads], blocks[counts == self.per_block])]

    def arrive(self, threads: Words) -> None:
        """Pass a barrier.

        Raises:
            EmulatorError: threads of a block are missing.
        """
        blocks = np.unique(self.block[threads])
        if len(threads) != len(blocks) * self.per_block:
            raise EmulatorError("a barrier that not every thread of the block arrives at")
        self.epoch[blocks] += 1

    def warps(self, words: Words, threads: Words) -> Words:
        """Rearrange the words of whole warps, one row a warp.

        Raises:
            EmulatorError: a lane is missing.
        """
        if len(threads) % WARP or (self.lane[threads] != np.tile(np.arange(WARP), len(threads) // WARP)).any():
            raise EmulatorError("an instruction of a whole warp that not all of its lanes run")
        return words.reshape(-1, WARP)

    def _constant(self, operand: str, bits: int) -> Words:
        key = (operand, bits)
        found = self._constants.get(key)
        if found is None:
            if operand == "global_smem":
                number = 0
            elif operand in self.program.local:
                number = self.program.local[operand]
            elif operand[:2] in ("0f", "0d"):
                number = int(operand[2:], 16)
            else:
                try:
                    number = int(operand.rstrip("U"), 0)
                except ValueError:
                    raise EmulatorError(f"unknown operand {operand!r}") from None
            if bits == 1:
                found = np.full(self.count, number != 0)
            else:
                found = np.full(self.count, number % (1 << bits), UNSIGNED[bits])
            found.flags.writeable = False
            self._constants[key] = found
        return found

    def _special_registers(self) -> dict[str, Words]:
        thread = (self.everyone % self.per_block).astype(np.uint32)
        found = {"%tid.x": thread, "%laneid": (thread % WARP).astype(np.uint32)}
        found["%tid.y"] = found["%tid.z"] = np.zeros_like(thread)
        found["%ntid.x"] = np.full_like(thread, self.per_block)
        block = self.block
        for axis, extent in zip(_AXES, self.grid, strict=True):
            found[f"%ctaid.{axis}"] = (block % extent).astype(np.uint32)
            found[f"%nctaid.{axis}"] = np.full_like(thread, extent)
            block = block // extent
        return found

    def _unwritten(self, register: str) -> Words:
        bits = self.program.register_width(register)
        if bits == 1:
            return np.ones(self.count, bool)
        return np.full(self.count, _POISON % (1 << bits), UNSIGNED[bits])
