"""One launch, and another look at it where warps of a block race."""

from __future__ import annotations

import numpy as np

from emulator.faults import EmulatorError
from emulator.machine import Machine
from emulator.threads import WARP, Launch


def run(launch: Launch, *, check_races: bool = True) -> None:
    """Run a kernel.

    A race that may be harmless is one if no order of warps changes a bit of memory: the first warp up to the next
    barrier first, or the last.

    Args:
        launch: the kernel and what it is given.
        check_races: whether races are looked for.

    Raises:
        EmulatorError: an access out of bounds or misaligned, a barrier in divergent code, a race, or an instruction
            that is not known.
    """
    program, memory = launch.program, launch.memory
    before = memory.copy() if check_races else []
    races = Machine(launch, check_races=check_races).run()
    if not races:
        return
    told = f"{program.name}: {'; '.join(race.text for race in races)}"
    if not all(race.may_be_harmless for race in races):
        raise EmulatorError(told)
    after = memory.copy()
    forwards = range(program.threads // WARP)
    for order in (forwards, forwards[::-1]):
        memory.restore(before)
        Machine(launch, check_races=False, order=order).run()
        if not all(np.array_equal(mine, theirs) for mine, theirs in zip(memory.copy(), after, strict=True)):
            raise EmulatorError(f"{told}, and the order of warps changes the result: is a barrier missing?")
