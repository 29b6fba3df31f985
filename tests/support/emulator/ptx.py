"""A kernel's PTX as instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from emulator.faults import EmulatorError
from emulator.words import width

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)", re.S)
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-zA-Z0-9_.:]+)\s*(.*)", re.S)
_ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_REGISTERS = re.compile(r"(%?\w+)(?:<\d+>)?")
_LOCAL = re.compile(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]")
_LABEL = re.compile(r"\s*([$\w]+):(?!:)")
# Lines that say nothing about what is computed.
_DIRECTIVES = (".loc ", ".loc\t", ".file", ".pragma", ".version", ".target", ".address_size")


class Address(NamedTuple):
    """``[base + offset]``; ``base`` is a register, a parameter or shared memory's symbol."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: up to the first dot: ``"ld"``.
        modifiers: the rest, in order: ``("global", "v4", "b32")``.
        operands: registers, immediates and names; addresses; tuples of registers.
        predicate: register that decides which threads take part, or None.
        negated: whether those take part whose predicate is false.
        text: as it was written.
    """

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    text: str

    @cached_property
    def type_name(self) -> str:
        """The last modifier: in most instructions the type of what they work on."""
        return self.modifiers[-1]

    @cached_property
    def vector(self) -> int:
        """Elements that each thread moves."""
        for modifier in ("v2", "v4", "v8"):
            if modifier in self.modifiers:
                return int(modifier[1:])
        return 1

    def register(self, index: int) -> str:
        """Return an operand that is a register, an immediate or a name."""
        operand = self.operands[index]
        if isinstance(operand, tuple) and len(operand) == 1:
            return operand[0]
        if not isinstance(operand, str):
            raise EmulatorError(f"operand {index} of `{self.text}` is no register")
        return operand

    def registers(self, index: int) -> tuple[str, ...]:
        """Return an operand that is a list of registers, or one."""
        operand = self.operands[index]
        if isinstance(operand, Address):
            raise EmulatorError(f"operand {index} of `{self.text}` is no list of registers")
        return (operand,) if isinstance(operand, str) else operand

    def address(self, index: int) -> Address:
        """Return an operand that is an address."""
        operand = self.operands[index]
        if not isinstance(operand, Address):
            raise EmulatorError(f"operand {index} of `{self.text}` is no address")
        return operand


@dataclass
class Program:
    """A kernel.

    Attributes:
        name: of its entry.
        parameters: their names, in order.
        threads: per block.
        instructions: in order.
        labels: name to the index of the instruction behind it.
        widths: register, or prefix of registers, to bits.
        local: name of each array in local memory to where it begins there.
        local_bytes: local memory of a thread.
    """

    name: str
    parameters: tuple[str, ...]
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read the text of a module with one entry and no functions.

        Raises:
            EmulatorError: something that the emulator does not know.
        """
        entry = _ENTRY.search(text)
        threads = _THREADS.search(text)
        if entry is None or threads is None:
            raise EmulatorError("no entry, or no number of threads")
        parameters = tuple(parameter.split()[-1] for parameter in entry.group(2).split(",") if parameter.strip())
        program = cls(entry.group(1), parameters, int(threads.group(1)))
        for statement in _statements(text[text.index("{", threads.end()) :]):
            program._add(statement)
        return program

    def register_width(self, name: str) -> int:
        """Return bits of a register."""
        bits = self.widths.get(name)
        if bits is None:
            prefix = name.rstrip("0123456789")
            if prefix not in self.widths:
                raise EmulatorError(f"register {name} is not declared")
            bits = self.widths[name] = self.widths[prefix]
        return bits

    def _add(self, statement: str) -> None:
        if statement.endswith(":"):
            self.labels[statement[:-1]] = len(self.instructions)
        elif statement.startswith(".reg"):
            _, type_name, names = statement.split(None, 2)
            for name in names.split(","):
                declared = _REGISTERS.match(name.strip())
                if declared is not None:
                    self.widths[declared.group(1)] = width(type_name.lstrip("."))
        elif (array := _LOCAL.fullmatch(statement)) is not None:
            alignment, name, length = int(array.group(1)), array.group(2), int(array.group(3))
            self.local[name] = -(-self.local_bytes // alignment) * alignment
            self.local_bytes = self.local[name] + length
        elif statement.startswith("."):
            raise EmulatorError(f"unknown declaration `{statement}`")
        else:
            self.instructions.append(_instruction(statement))


def _statements(body: str) -> Iterator[str]:
    """Yield statements and labels (with their colon) of the first function body in ``body``."""
    lines = (line.split("//", 1)[0].strip() for line in body.splitlines())
    text = " ".join(line for line in lines if line and not line.startswith(_DIRECTIVES))
    # What follows the function is for debuggers.
    text = re.split(r"\.section|\.file", text)[0]
    for piece in text.split(";"):
        rest = piece.strip()
        while rest:
            # No statement begins with a list of registers: a brace there opens or closes a scope.
            rest = rest.lstrip("{} \t")
            label = _LABEL.match(rest)
            if label is None:
                if rest:
                    yield rest
                break
            yield label.group(1) + ":"
            rest = rest[label.end() :].strip()


def _instruction(statement: str) -> Instruction:
    found = _INSTRUCTION.fullmatch(statement)
    if found is None:
        raise EmulatorError(f"cannot read `{statement}`")
    negated, predicate, opcode, rest = found.groups()
    name, *modifiers = opcode.replace("::", ".").split(".")
    operands = tuple(_operand(part) for part in _split(rest))
    return Instruction(name, tuple(modifiers), operands, predicate, negated == "!", statement)


def _split(operands: str) -> Iterator[str]:
    """Yield operands between commas that are in no brackets."""
    depth, start = 0, 0
    for place, character in enumerate(operands):
        if character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        elif character == "," and depth == 0:
            yield operands[start:place].strip()
            start = place + 1
    if operands[start:].strip():
        yield operands[start:].strip()


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text.strip("{} ").split(","))
    address = _ADDRESS.fullmatch(text)
    if address is not None:
        return Address(address.group(1), int(address.group(2) or "0", 0))
    return text
