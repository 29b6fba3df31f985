"""The pages of the documentation: their Python blocks, their commands and their links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
# Pages that are read where they lie in the repository.
_TABLES = ("ZOO.md", "TRAINERS.md", "TORCH_TESTS.md")
DOCUMENTS = [path for path in sorted(ROOT.glob("*.md")) if path.name not in _TABLES] + [ROOT / "perf" / "README.md"]

_FENCE = re.compile(r"```(.*)")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
# In a fence without a language stand commands: README, CONTRIBUTING and perf/README.md write them so.
_SHELL = ("sh", "")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: what follows the fence.
        code: the lines inside.
        line: where the code begins, counted from 1.
        reason: why it is not run, or None.
    """

    language: str
    code: str
    line: int
    reason: str | None


def blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    lines = path.read_text().splitlines()
    found: list[Block] = []
    start = None
    for number, line in enumerate(lines):
        fence = _FENCE.fullmatch(line.strip())
        if fence and start is None:
            start = number
        elif fence and not fence[1]:
            language = lines[start].strip().removeprefix("```")
            reason = _NOT_RUN.fullmatch(lines[start - 1]) if start else None
            code = "\n".join(lines[start + 1 : number])
            found.append(Block(language, code, start + 2, reason and reason[1]))
            start = None
    return found


def python_blocks(path: Path) -> list[Block]:
    """Return the blocks of Python of a page."""
    return [block for block in blocks(path) if block.language == "python"]


def commands(path: Path) -> list[str]:
    """Return the commands of a page, each in one line, without comments."""
    text = "\n".join(block.code for block in blocks(path) if block.language in _SHELL)
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def described() -> list[tuple[str, str]]:
    """Return each name that a page of docs/api describes, behind the directive that names it."""
    found = []
    for path in (ROOT / "docs" / "api").glob("*.rst"):
        package = ""
        for directive, name in re.findall(r"^\.\. ([\w]+):: *(\S*)$", path.read_text(), re.MULTILINE):
            if directive == "currentmodule":
                package = name
            else:
                found.append((directive, name if name.startswith("tritonq.") else f"{package}.{name}"))
    return found


def links(path: Path) -> list[str]:
    """Return the targets of a page's links and pictures, code left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)
