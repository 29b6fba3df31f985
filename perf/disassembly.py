"""Read GPU disassembly: which instructions run for every element, and how wide the accesses to memory are.

Works on the text of cuobjdump (NVIDIA) and on AMD assembly. Counts are static: instructions per lane along the path
that every lane takes, or of one turn of the main loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        opcode: with its modifiers, without its predicate.
        target: index of the instruction it may jump to, or None.
        ends: control never reaches the next instruction.
        calls: jumps to a subroutine (NVIDIA: the slow path of a division).
        access_bits: width of its access to global memory, 0 for other instructions.
        stores: the access is a write.
        spills: bits it moves to or from local memory.
        operands: as the disassembler writes them.
    """

    opcode: str
    target: int | None
    ends: bool
    calls: bool
    access_bits: int
    stores: bool
    spills: int
    operands: str = ""


@dataclass(frozen=True)
class MainPath:
    """The instructions that one lane runs for one tile; in a loop, for one turn.

    Attributes:
        instructions: in program order, without code that runs only in rare cases.
        is_loop: one turn of the innermost loop that reads global memory.
    """

    instructions: tuple[Instruction, ...]
    is_loop: bool

    def bits(self, *, stores: bool) -> int:
        """Return how many bits of global memory one lane reads, or with ``stores`` writes."""
        return sum(i.access_bits for i in self.instructions if i.stores == stores)

    def bits_of_width(self, width: int) -> int:
        """Return how many bits of global memory one lane moves by accesses of ``width`` bits."""
        return sum(i.access_bits for i in self.instructions if i.access_bits == width)

    def usual_width(self) -> int:
        """Return the width, in bits, of the accesses that move most of the data; 0 if there are none."""
        return max({i.access_bits for i in self.instructions}, key=self.bits_of_width, default=0)


_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_SASS_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)\b")
_SASS_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def parse_sass(text: str) -> list[Instruction]:
    """Return the instructions in the output of ``cuobjdump -sass`` for one kernel, without padding."""
    rows = [match.groups() for match in map(_SASS.match, text.splitlines()) if match]
    index = {int(address, 16): i for i, (address, *_) in enumerate(rows)}
    parsed = []
    for i, (_, predicate, opcode, operands) in enumerate(rows):
        stem = opcode.split(".")[0]
        width = _SASS_WIDTH.search(opcode)
        bits = _SASS_BITS[width.group(1)] if width else 32
        jump = re.search(r"\b0x([0-9a-f]+)\s*$", operands.strip()) if stem in ("BRA", "CALL") else None
        target = index.get(int(jump.group(1), 16)) if jump else None
        parsed.append(
            Instruction(
                opcode,
                target,
                stem in ("BRA", "EXIT", "RET") and predicate is None and ", " not in operands,
                # For sm_80, ptxas leaves loops by a "call" over the branch that follows it, the one back.
                stem == "CALL" and target != i + 2,
                bits if stem in ("LDG", "STG") else 0,
                stem == "STG",
                bits if stem in ("LDL", "STL") else 0,
                operands,
            )
        )
    while parsed and parsed[-1].opcode == "NOP":
        parsed.pop()
    return parsed


_REGISTER = re.compile(r"\bR(\d+)\b")
_REGISTER_BITS = 32


def bytes_per_wait(path: MainPath) -> float:
    """Return bytes of global memory that one lane reads, for each time that it waits for what it has loaded.

    A lane waits where it uses a register of a load. All that was loaded before is taken to have arrived then. Of a
    loop, the second turn counts, which begins with the loads of the turn before; of other code the longest wait. Of
    NVIDIA's code alone.
    """
    waits: list[int] = []
    pending: dict[int, int] = {}
    for _ in range(1 + path.is_loop):
        waits.clear()
        for instruction in path.instructions:
            used = {int(number) for number in _REGISTER.findall(instruction.operands)}
            if used & pending.keys():
                waits.append(sum(pending.values()))
                pending.clear()
            if _reads(instruction):
                first = int(_REGISTER.findall(instruction.operands)[0])
                last = first + max(1, instruction.access_bits // _REGISTER_BITS)
                pending.update(dict.fromkeys(range(first, last), 0))
                pending[first] = instruction.access_bits // 8
    if path.is_loop:
        return path.bits(stores=False) / 8 / max(1, len(waits))
    return max([*waits, sum(pending.values())])


_GCN_WIDTH = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}


def parse_amdgcn(text: str) -> list[Instruction]:
    """Return the instructions in the AMD assembly of one kernel."""
    labels: dict[str, int] = {}
    rows: list[tuple[str, str]] = []
    for line in text.splitlines():
        line = line.split(";")[0].rstrip()
        if line.endswith(":"):
            labels[line[:-1]] = len(rows)
        elif re.match(r"^\s+[a-z]", line):
            opcode, _, operands = line.strip().partition(" ")
            rows.append((opcode, operands.strip()))
    parsed = []
    for opcode, operands in rows:
        memory = re.match(r"(global|buffer|flat)_(load|store)_([a-z0-9_]+?)(?:_d16(?:_hi)?)?$", opcode)
        bits = 0
        if memory:
            kind = memory.group(3)
            words = re.match(r"dwordx?(\d)?$", kind)
            bits = 32 * int(words.group(1) or 1) if words else _GCN_WIDTH.get(kind, 32)
        parsed.append(
            Instruction(
                opcode,
                labels.get(operands) if opcode.startswith(("s_cbranch", "s_branch")) else None,
                opcode in ("s_branch", "s_endpgm", "s_setpc_b64"),
                False,
                bits,
                memory is not None and memory.group(2) == "store",
                32 if opcode.startswith("scratch_") else 0,
            )
        )
    return parsed


def main_path(instructions: Sequence[Instruction]) -> MainPath:
    """Return the first innermost loop that reads global memory, or else everything that is not rare.

    Rare is what calls a subroutine (a division's slow path), and what only such code reaches. Of several loops the
    first counts: a kernel puts the usual case before the exceptional one.
    """
    blocks = _blocks(instructions)
    hot = _reachable(instructions, blocks)
    loops = []
    for i in hot:
        target = instructions[i].target
        if target is not None and target < i and any(_reads(instructions[j]) for j in range(target, i)):
            loops.append((target, i))
    innermost = [loop for loop in loops if not any(other != loop and _contains(loop, other) for other in loops)]
    if innermost:
        start, end = min(innermost)
        return MainPath(tuple(instructions[j] for j in range(start, end + 1) if j in hot), True)
    return MainPath(tuple(instructions[j] for j in sorted(hot)), False)


def _reads(instruction: Instruction) -> bool:
    return instruction.access_bits > 0 and not instruction.stores


def _contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _blocks(instructions: Sequence[Instruction]) -> list[range]:
    """Return the basic blocks as ranges of indices, in program order."""
    starts = {0}
    for i, instruction in enumerate(instructions):
        if instruction.target is not None:
            starts.add(instruction.target)
        if instruction.target is not None or instruction.ends:
            starts.add(i + 1)
    cuts = sorted(s for s in starts if s < len(instructions))
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(instructions)], strict=True)]


def _reachable(instructions: Sequence[Instruction], blocks: Iterable[range]) -> set[int]:
    """Return the indices of instructions that run without entering a block that calls a subroutine."""
    by_start = {block.start: block for block in blocks}
    hot: set[int] = set()
    waiting = [0]
    while waiting:
        block = by_start.get(waiting.pop())
        if block is None or block.start in hot or any(instructions[i].calls for i in block):
            continue
        hot.update(block)
        last = instructions[block[-1]]
        if last.target is not None:
            waiting.append(last.target)
        if not last.ends:
            waiting.append(block.stop)
    return hot
