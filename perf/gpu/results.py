"""Results of a visit to a GPU: one line per finding, written when it is found, and a text for people."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tritonq.deploy.files import atomic_file

Record = dict[str, Any]

RESULTS, SUMMARY, LOG, PROFILE = "results.jsonl", "summary.txt", "log.txt", "profile.txt"


def append(path: Path, record: Record) -> None:
    """Append ``record`` as one JSON line in one write; several processes may do so at a time.

    A process that is killed loses at most the line that it was writing.
    """
    line = (json.dumps(record, default=str) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


def read(path: Path) -> list[Record]:
    """Return the records of a results file, without a last line that was cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def write_text(path: Path, text: str) -> None:
    """Replace the file ``path`` as a whole by ``text``."""
    with atomic_file(path) as file:
        file.write(text.encode())


def summarize(records: Iterable[Record]) -> str:
    """Return one line per finding, grouped by part, in the order of the records; failures are marked with ``!``."""
    parts: dict[str, list[str]] = {}
    for record in records:
        parts.setdefault(record["part"], []).append(_line(record))
    return "\n".join(f"{name}\n" + "\n".join(lines) + "\n" for name, lines in parts.items())


def failures(records: Iterable[Record]) -> list[Record]:
    """Return the records whose status says that something is wrong."""
    return [record for record in records if record["status"] not in _FINE]


# "not run" needs no one's attention: a peer or tool that is not installed, or a part that had no time left.
_FINE = ("ok", "not run")


def _line(record: Record) -> str:
    fields = {name: value for name, value in record.items() if name not in ("part", "status", "at_s", "name")}
    mark = "  " if record["status"] in _FINE else "! "
    status = "" if record["status"] == "ok" else f" {record['status']}"
    shown = ", ".join(f"{name} {_shown(value)}" for name, value in fields.items())
    return f"{mark}{record['name']}:{status}{' ' if shown else ''}{shown}"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
