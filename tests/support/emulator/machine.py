"""Control flow: which threads run which instruction next, and the barriers between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from emulator import arithmetic, conversion, logic, matrices, movement, warps
from emulator.faults import EmulatorError
from emulator.ptx import Instruction
from emulator.races import Race
from emulator.threads import WARP, Launch, Threads
from emulator.words import Words

# More than any kernel of the tests takes, each for all threads that are there.
_MAX_STEPS = 5_000_000

Run = Callable[[Threads, Instruction, Words], None]
_INSTRUCTIONS: dict[str, Run] = {
    name: run
    for table in (arithmetic.TABLE, conversion.TABLE, logic.TABLE, matrices.TABLE, movement.TABLE, warps.TABLE)
    for name, run in table.items()
}
# What orders memory, or fetches it earlier: all accesses here are done at once, in order.
_NOTHING = frozenset({"fence", "membar", "griddepcontrol", "prefetch", "nanosleep"})
_LEAVES = frozenset({"ret", "exit"})
_BARRIERS = frozenset({"bar", "barrier"})


class Machine:
    """One launch.

    Threads at the smallest instruction number run first, together; those that a branch sent ahead wait there and join
    them again. With an ``order`` of warps, each warp of a block runs by itself up to the next barrier instead.
    """

    def __init__(self, launch: Launch, *, check_races: bool = True, order: Sequence[int] | None = None) -> None:
        self.threads = Threads(launch, check_races=check_races)
        self._order = order
        self._steps = 0

    def run(self) -> list[Race]:
        """Run all threads to their end; return the races that were found.

        Raises:
            EmulatorError: an access out of bounds or misaligned, a barrier in divergent code, or an instruction that is
                not known.
        """
        with np.errstate(all="ignore"):
            if self._order is None:
                self._run_groups({0: self.threads.everyone}, stops=False)
            else:
                self._run_warps(self._order)
        return [] if self.threads.log is None else self.threads.log.races()

    def _run_warps(self, order: Sequence[int]) -> None:
        warp = self.threads.everyone % self.threads.per_block // WARP
        groups = {0: self.threads.everyone}
        while groups:
            waiting: dict[int, Words] = {}
            for number in order:
                mine = {place: some[warp[some] == number] for place, some in groups.items()}
                for place, some in self._run_groups({p: m for p, m in mine.items() if len(m)}, stops=True).items():
                    _join(waiting, place, some)
            groups = {}
            for place, some in waiting.items():
                self._execute(self.threads.program.instructions[place], some)
                groups[place + 1] = some

    def _run_groups(self, groups: dict[int, Words], *, stops: bool) -> dict[int, Words]:
        """Run threads by their next instruction; with ``stops`` up to barriers, and return who waits there.

        Without ``stops``, threads wait at a barrier while others of their block run code that stands behind it and
        leads back.
        """
        instructions = self.threads.program.instructions
        waiting: dict[int, Words] = {}
        while groups:
            number = min(groups)
            active = groups.pop(number)
            others = min(groups, default=len(instructions))
            while number < len(instructions):
                if number == others:
                    active = np.sort(np.concatenate([active, groups.pop(number)]))
                    others = min(groups, default=len(instructions))
                self._steps += 1
                if self._steps > _MAX_STEPS:
                    raise EmulatorError(f"{self.threads.program.name}: does not end")
                instruction = instructions[number]
                if _is_barrier(instruction):
                    _join(waiting, number, active)
                    active = active[:0] if stops else self.threads.of_whole_blocks(waiting[number])
                    waiting[number] = np.setdiff1d(waiting[number], active, assume_unique=True)
                    if len(active) == 0:
                        break
                chosen = self._chosen(instruction, active)
                if instruction.name == "bra":
                    self._branch(groups, number, instruction, active, chosen)
                    break
                if instruction.name in _LEAVES:
                    active = np.setdiff1d(active, chosen, assume_unique=True)
                    if len(active) == 0:
                        break
                elif len(chosen):
                    self._execute(instruction, chosen)
                number += 1
        if not stops:
            for number, some in waiting.items():
                if len(some):
                    self._execute(instructions[number], some)
        return waiting

    def _chosen(self, instruction: Instruction, active: Words) -> Words:
        """Return the threads whose predicate holds."""
        if instruction.predicate is None:
            return active
        holds = self.threads.words(instruction.predicate, 1, active)
        if instruction.negated:
            holds = ~holds
        return active if holds.all() else active[holds]

    def _branch(
        self, groups: dict[int, Words], number: int, instruction: Instruction, active: Words, chosen: Words
    ) -> None:
        target = self.threads.program.labels[instruction.register(0)]
        rest = np.setdiff1d(active, chosen, assume_unique=True) if len(chosen) < len(active) else active[:0]
        for place, some in ((target, chosen), (number + 1, rest)):
            if len(some):
                _join(groups, place, some)

    def _execute(self, instruction: Instruction, threads: Words) -> None:
        try:
            if _is_barrier(instruction):
                self.threads.arrive(threads)
            elif instruction.name not in _NOTHING and instruction.name not in _BARRIERS:
                run = _INSTRUCTIONS.get(instruction.name)
                if run is None:
                    raise EmulatorError("unknown instruction")
                run(self.threads, instruction, threads)
        except EmulatorError as fault:
            raise EmulatorError(f"{self.threads.program.name}: {fault}, at `{instruction.text}`") from None


def _is_barrier(instruction: Instruction) -> bool:
    """Whether threads of a block wait for each other: lanes of a warp are in step anyway."""
    return instruction.name in _BARRIERS and "warp" not in instruction.modifiers


def _join(groups: dict[int, Words], place: int, threads: Words) -> None:
    """Add threads to those at an instruction."""
    groups[place] = np.sort(np.concatenate([groups[place], threads])) if place in groups else threads
