"""Run commands that end when their time is over, with all processes that they started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, NoReturn

_SECONDS_TO_END = 5.0


def end_with_children() -> None:
    """Let SIGTERM, with which time limits end this process, raise SystemExit: what it runs is then killed as well."""
    signal.signal(signal.SIGTERM, _raise_exit)


def _raise_exit(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def run_limited(command: Sequence[str], seconds: float, log: IO[bytes]) -> int | None:
    """Run ``command`` with its output in ``log``; return its exit status, or None if it was stopped after ``seconds``.

    The command runs in a process group of its own, which is killed when the command ends, when the time is over, and
    when the caller is interrupted.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process that waits for a driver does not end; what comes next need not wait for it.
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
