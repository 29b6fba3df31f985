"""Result files: one JSON line per measurement, one new file per run, never overwritten."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

Record = dict[str, Any]

# Raised when a field changes its meaning; files of another schema are named and ignored.
SCHEMA = 1

# Without these a line can't be shown or plotted.
_REQUIRED = ("schema", "run", "case", "family", "implementation", "status", "environment", "time")


def utc_now() -> str:
    """Return the present time, ISO 8601, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def create(folder: Path, label: str) -> IO[str]:
    """Open a new file ``<UTC time>-<label>.jsonl`` in ``folder`` for writing.

    Creation is exclusive: when the name is taken, also by a run that started in the same second, a number is added.

    Raises:
        OSError: the folder can't be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{label}"
    for attempt in range(1, 1000):
        path = folder / (f"{stem}.jsonl" if attempt == 1 else f"{stem}-{attempt}.jsonl")
        try:
            return path.open("x", encoding="utf-8")
        except FileExistsError:
            continue
    raise FileExistsError(f"a thousand result files are called {stem} in {folder}")


def write(file: IO[str], record: Record) -> None:
    """Append one record, marked with its run, and flush, so that an interrupted run keeps what it measured."""
    marked = {"schema": SCHEMA, "run": Path(file.name).stem, **record}
    file.write(json.dumps(marked, allow_nan=False) + "\n")
    file.flush()


def read(path: Path) -> list[Record]:
    """Return the records of one file.

    Raises:
        ValueError: a damaged file; the message names it and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as a results file ({error})") from error
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def read_folder(folder: Path) -> list[Record]:
    """Return the records of all files below ``folder``, oldest first.

    Damaged files are left out, and a warning names them.
    """
    return list(_usable(sorted(folder.rglob("*.jsonl"), key=lambda path: path.name)))


def latest(found: Iterable[Record]) -> list[Record]:
    """Return the records of the last run of each case on each device; so records that are compared are of one run."""
    runs: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in found:
        by_run = runs.setdefault((record["case"], record["environment"]["device"]), {})
        by_run.setdefault(record["run"], []).append(record)
    # A run's name begins with the time of its start.
    return [record for by_run in runs.values() for record in by_run[max(by_run)]]


def _usable(paths: Iterable[Path]) -> Iterator[Record]:
    for path in paths:
        try:
            yield from read(path)
        except ValueError as error:
            warnings.warn(f"ignored a results file: {error}", stacklevel=3)


def _parse(path: Path, number: int, line: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
    if not isinstance(record, dict) or not isinstance(record.get("environment"), dict):
        raise ValueError(f"{path}, line {number}: not a measurement")
    missing = [name for name in _REQUIRED if name not in record]
    if missing:
        raise ValueError(f"{path}, line {number}: lacks {', '.join(missing)}")
    if record["schema"] != SCHEMA:
        raise ValueError(f"{path}, line {number}: schema {record['schema']!r}, this version reads {SCHEMA}")
    return record
