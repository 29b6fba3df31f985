"""Races: accesses to one location whose order nothing fixes."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from emulator.words import Words

_WARP = 32
_KINDS = {"read": 0, "write": 1, "atomic": 2}


class Race(NamedTuple):
    """Accesses whose order nothing fixes.

    Attributes:
        text: what and where.
        may_be_harmless: whether the launch may be right all the same, whichever comes first: all warps of a block read
            a scalar that one of them writes later, and only what that one read is used.
    """

    text: str
    may_be_harmless: bool


class _Accesses(NamedTuple):
    """Accesses of one instruction, one entry a thread; several columns of a table."""

    location: Words
    kind: Words
    thread: Words
    block: Words
    epoch: Words
    word: Words

    def picked(self, which: Words) -> _Accesses:
        return _Accesses(*(column[which] for column in self))


class AccessLog:
    """All accesses of a launch to global and shared memory."""

    def __init__(self, threads_per_block: int) -> None:
        self._threads_per_block = threads_per_block
        self._entries: dict[str, list[tuple[str, Words, int, Words, Words, Words, Words | None]]] = defaultdict(list)

    def add(
        self,
        space: str,
        kind: str,
        addresses: Words,
        size: int,
        threads: Words,
        blocks: Words,
        epochs: Words,
        words: Words | None,
    ) -> None:
        """Remember accesses of ``size`` bytes.

        Args:
            space: ``"global"`` or ``"shared"``.
            kind: ``"read"``, ``"write"`` or ``"atomic"``.
            addresses: one a thread.
            size: bytes of each.
            threads: numbers of the threads.
            blocks: of their blocks.
            epochs: how many barriers each block had passed.
            words: what was written; None for reads and atomics.
        """
        self._entries[space].append((kind, addresses, size, threads, blocks, epochs, words))

    def races(self) -> list[Race]:
        """Return what may go wrong."""
        found: list[Race] = []
        for space in self._entries:
            accesses = self._table(space)
            if len(accesses.location):
                found += _within_blocks(space, accesses)
                if space == "global":
                    found += _between_blocks(accesses)
        return found

    def _table(self, space: str) -> _Accesses:
        """Accesses to what somebody wrote, split into pieces of the smallest size, sorted by location and time."""
        columns: list[list[Words]] = [[] for _ in _Accesses._fields]
        smallest = min(size for _, _, size, *_ in self._entries[space])
        for kind, addresses, size, threads, blocks, epochs, words in self._entries[space]:
            locations = addresses.astype(np.int64) // smallest
            if space == "shared":
                # Every block has its own.
                locations = locations + (blocks << 32)
            values = np.zeros(len(threads), np.int64) if words is None else words.astype(np.int64)
            for piece in range(size // smallest):
                entry = (locations + piece, np.full(len(threads), _KINDS[kind], np.int8), threads, blocks, epochs)
                for column, part in zip(columns, (*entry, values), strict=True):
                    column.append(part)
        accesses = _Accesses(*(np.concatenate(column) for column in columns))
        written = np.unique(accesses.location[accesses.kind != _KINDS["read"]])
        accesses = accesses.picked(np.isin(accesses.location, written))
        return accesses.picked(np.lexsort((accesses.epoch, accesses.block, accesses.location)))


def _within_blocks(space: str, accesses: _Accesses) -> list[Race]:
    """Return two warps of a block, between two barriers: one writes, and the other reads or writes something else."""
    keys = (accesses.location, accesses.block, accesses.epoch)
    starts = _starts(*keys)
    warp = accesses.thread // _WARP
    is_write = accesses.kind == _KINDS["write"]
    bounds = np.iinfo(np.int64)
    lowest = np.minimum.reduceat(np.where(is_write, accesses.word, bounds.max), starts)
    highest = np.maximum.reduceat(np.where(is_write, accesses.word, bounds.min), starts)
    several = np.minimum.reduceat(warp, starts) != np.maximum.reduceat(warp, starts)
    others = np.maximum.reduceat(~is_write, starts)
    wrong = several & np.maximum.reduceat(is_write, starts) & (others | (lowest != highest))
    # Atomics and reads of one location are not ordered either.
    atomic, read = (np.maximum.reduceat(accesses.kind == _KINDS[kind], starts) for kind in ("atomic", "read"))
    wrong |= several & atomic & read
    if not wrong.any():
        return []
    first = starts[wrong][0]
    text = (
        f"race between warps of a block at {int(wrong.sum())} {space} locations, first in block"
        f" {accesses.block[first]} after {accesses.epoch[first]} barriers"
    )
    return [Race(text, may_be_harmless=space == "global")]


def _between_blocks(accesses: _Accesses) -> list[Race]:
    """Return two blocks: one writes what the other accesses, or adds atomically to what the other reads."""
    starts = _starts(accesses.location)
    several = np.minimum.reduceat(accesses.block, starts) != np.maximum.reduceat(accesses.block, starts)
    read, write, atomic = (
        np.maximum.reduceat(accesses.kind == _KINDS[kind], starts) for kind in ("read", "write", "atomic")
    )
    wrong = several & (write | (atomic & read))
    if not wrong.any():
        return []
    return [Race(f"race between blocks at {int(wrong.sum())} global locations", may_be_harmless=False)]


def _starts(*keys: Words) -> Words:
    """Return where groups of equal keys begin in sorted columns."""
    changes = np.zeros(len(keys[0]) - 1, bool)
    for key in keys:
        changes |= key[1:] != key[:-1]
    return np.flatnonzero(np.r_[True, changes])
