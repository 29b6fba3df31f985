"""Global, shared and local memory: bounds and alignment of every access are checked."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from emulator.faults import EmulatorError
from emulator.words import UNSIGNED, Words

# Shared and local memory that nothing wrote.
_POISON = 0xCD
# A row of shared or local memory is a multiple of every access.
_ROW = 16


class GlobalMemory:
    """The host's memory, of which a launch may touch the ranges that were added."""

    def __init__(self) -> None:
        self._ranges: dict[int, int] = {}
        self._starts: Words = np.zeros(0, np.uint64)
        self._ends: Words = np.zeros(0, np.uint64)
        self._bytes: list[Words] = []

    def add(self, start: int, length: int) -> None:
        """Let launches touch ``length`` bytes from ``start``. Ranges of different tensors do not overlap."""
        if length == 0 or self._ranges.get(start, -1) >= length:
            return
        self._ranges[start] = length
        order = sorted(self._ranges)
        self._starts = np.array(order, np.uint64)
        self._ends = np.array([begin + self._ranges[begin] for begin in order], np.uint64)
        self._bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * self._ranges[begin]).from_address(begin)) for begin in order
        ]

    def copy(self) -> list[Words]:
        """Return the bytes of every range."""
        return [memory.copy() for memory in self._bytes]

    def restore(self, copy: list[Words]) -> None:
        """Put back what :meth:`copy` returned."""
        for memory, content in zip(self._bytes, copy, strict=True):
            memory[...] = content

    def load(self, addresses: Words, size: int) -> Words:
        """Return words of ``size`` bytes at ``addresses`` (uint64)."""
        out = np.empty(len(addresses), UNSIGNED[8 * size])
        for part, view, places in self._parts(addresses, size, "load"):
            out[part] = view[places]
        return out

    def store(self, addresses: Words, words: Words, size: int) -> None:
        """Write words; of several to one address the last stays."""
        for part, view, places in self._parts(addresses, size, "store"):
            view[places] = words[part]

    def add_atomically(self, addresses: Words, words: Words, size: int) -> Words:
        """Add integers, one thread after the other; return what was there before each addition."""
        out = np.empty(len(addresses), UNSIGNED[8 * size])
        for part, view, places in self._parts(addresses, size, "atomic addition"):
            out[part] = before_each(view, places, words[part])
            np.add.at(view, places, words[part])
        return out

    def _parts(self, addresses: Words, size: int, action: str) -> list[tuple[Any, Words, Words]]:
        """For each range touched: which accesses, its memory as words, and their places in it."""
        if len(addresses) == 0:
            return []
        check_aligned(addresses, size, f"global {action}")
        owners = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        outside = owners < 0
        if len(self._starts):
            outside |= addresses + np.uint64(size) > self._ends[np.maximum(owners, 0)]
        if outside.any():
            first = int(addresses[outside][0])
            raise EmulatorError(
                f"global {action} of {size} bytes out of bounds by {int(outside.sum())} threads, first"
                f" {self._place(first)}"
            )
        parts: list[tuple[Any, Words, Words]] = []
        found = np.unique(owners)
        for owner in found:
            part: Any = slice(None) if len(found) == 1 else owners == owner
            start, memory = int(self._starts[owner]), self._bytes[owner]
            # Offsets are counted from an aligned address at or below the start.
            skip = -start % size
            view = memory[skip : skip + (len(memory) - skip) // size * size].view(UNSIGNED[8 * size])
            parts.append(
                (part, view, ((addresses[part] - np.uint64(start + skip)) // np.uint64(size)).astype(np.int64))
            )
        return parts

    def _place(self, address: int) -> str:
        """Return where an address lies, seen from the nearest range below it."""
        below = [start for start in self._ranges if start <= address]
        if not below:
            return f"at {address:#x}, below all tensors of the launch"
        return f"at byte {address - max(below)} of a tensor of {self._ranges[max(below)]} bytes"


class OwnMemory:
    """Memory that each owner has for itself; nothing is in it before it is written.

    Args:
        space: ``"shared"``, whose owners are blocks, or ``"local"``, whose owners are threads.
        owners: how many.
        length: bytes of each.
    """

    def __init__(self, space: str, owners: int, length: int) -> None:
        self.space, self.length = space, length
        row = -(-max(length, 1) // _ROW) * _ROW
        memory = np.full((owners, row), _POISON, np.uint8)
        self._views = {size: memory.view(UNSIGNED[8 * size]) for size in (1, 2, 4, 8)}

    def load(self, owners: Words, addresses: Words, size: int) -> Words:
        """Return words of ``size`` bytes, one of each owner given."""
        return self._views[size][owners, self._places(addresses, size, "load")]

    def store(self, owners: Words, addresses: Words, words: Words, size: int) -> None:
        """Write words."""
        self._views[size][owners, self._places(addresses, size, "store")] = words

    def add_atomically(self, owners: Words, addresses: Words, words: Words, size: int) -> Words:
        """Add integers, one thread after the other; return what was there before each addition."""
        view, places = self._views[size], self._places(addresses, size, "atomic addition")
        flat = owners * view.shape[1] + places
        out = before_each(view.reshape(-1), flat, words)
        np.add.at(view, (owners, places), words)
        return out

    def _places(self, addresses: Words, size: int, action: str) -> Words:
        check_aligned(addresses, size, f"{self.space} {action}")
        outside = addresses.astype(np.int64) + size > self.length
        if outside.any():
            raise EmulatorError(
                f"{self.space} {action} of {size} bytes at byte {int(addresses[outside][0])} of {self.length}, "
                "out of bounds"
            )
        return (addresses // addresses.dtype.type(size)).astype(np.int64)


def check_aligned(addresses: Words, size: int, action: str) -> None:
    """Raise EmulatorError where an access of ``size`` bytes is not at a multiple of them."""
    wrong = addresses % addresses.dtype.type(size)
    if wrong.any():
        raise EmulatorError(f"{action} of {size} bytes is misaligned by {int(wrong.max())}")


def before_each(memory: Words, places: Words, amounts: Words) -> Words:
    """Return what each of several additions finds: those to the same place before it, in order, are done."""
    order = np.argsort(places, kind="stable")
    total = np.cumsum(amounts[order], dtype=memory.dtype)
    first = np.r_[True, places[order][1:] != places[order][:-1]]
    begins = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    earlier = total - amounts[order] - np.where(begins > 0, total[begins - 1], 0).astype(memory.dtype)
    out = np.empty(len(places), memory.dtype)
    out[order] = memory[places[order]] + earlier
    return out
