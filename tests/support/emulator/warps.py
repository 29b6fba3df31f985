"""Instructions of a whole warp that exchange registers."""

from __future__ import annotations

import numpy as np

from emulator.faults import EmulatorError
from emulator.ptx import Instruction
from emulator.threads import WARP, Threads
from emulator.words import UNSIGNED, Words, encode, width

_REDUCTIONS = {
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


def _shfl(threads: Threads, instruction: Instruction, which: Words) -> None:
    mode = instruction.modifiers[1]
    lane, offset = threads.lane[which], threads.words(instruction.register(2), 32, which).astype(np.int64)
    if instruction.operands[3] != "31" and not (mode == "up" and instruction.operands[3] == "0"):
        raise EmulatorError("a shuffle of less than a warp")
    if mode == "bfly":
        source = lane ^ offset
    elif mode == "idx":
        source = offset % WARP
    elif mode == "up":
        source = np.where(lane >= offset, lane - offset, lane)
    elif mode == "down":
        source = np.where(lane + offset < WARP, lane + offset, lane)
    else:
        raise EmulatorError("an unknown shuffle")
    # Where each of the launch's threads is among those that take part.
    place = np.full(threads.count, -1)
    place[which] = np.arange(len(which))
    places = place[which - lane + source]
    if (places < 0).any():
        raise EmulatorError("a shuffle that reads a lane that takes no part")
    words = threads.words(instruction.register(1), 32, which)[places]
    if "|" in instruction.register(0):
        raise EmulatorError("a shuffle that returns a predicate")
    threads.write(instruction.register(0), words, which)


def _vote(threads: Threads, instruction: Instruction, which: Words) -> None:
    if "ballot" not in instruction.modifiers:
        raise EmulatorError("an unknown vote")
    votes = threads.warps(threads.words(instruction.register(1), 1, which), which)
    ballots = np.bitwise_or.reduce(votes.astype(np.uint32) << np.arange(WARP, dtype=np.uint32), axis=1)
    threads.write(instruction.register(0), np.repeat(ballots, WARP), which)


def _redux(threads: Threads, instruction: Instruction, which: Words) -> None:
    type_name, kind = instruction.type_name, instruction.modifiers[1]
    rows = threads.warps(threads.values(instruction.register(1), type_name, which), which)
    if kind == "add":
        result = rows.sum(1, dtype=rows.dtype)
    elif kind in _REDUCTIONS:
        result = _REDUCTIONS[kind](rows, 1)
    else:
        raise EmulatorError("an unknown reduction")
    words = encode(result, type_name) if type_name[0] == "f" else result.view(UNSIGNED[width(type_name)])
    threads.write(instruction.register(0), np.repeat(words, WARP), which)


TABLE = {"shfl": _shfl, "vote": _vote, "redux": _redux}
