"""What a command prints, whatever takes it: a terminal of few letters, a pipe that closes early, a full disk."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


@contextmanager
def printed_whole() -> Iterator[None]:
    """Write all that the block of ``with`` prints to standard output, to the last letter, before the block ends.

    Letters that standard output has no code for, and bytes in names of files that are no letters, become Python's
    escapes with a backslash. Where a shell closed standard output, nothing is done.

    Raises:
        BrokenPipeError: the program that reads the output ended.
        OSError: the output can't be written, as on a full disk.
    """
    stdout: TextIO | None = sys.stdout  # None where a shell closed it
    wrapper = stdout if isinstance(stdout, io.TextIOWrapper) else None
    strict = "strict" if wrapper is None else wrapper.errors
    if wrapper is not None:
        wrapper.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if stdout is not None:
            _flush(stdout)
        if wrapper is not None and not wrapper.closed:
            wrapper.reconfigure(errors=strict)


def _flush(stdout: TextIO) -> None:
    try:
        stdout.flush()
    except OSError as error:
        with suppress(OSError):  # or else the interpreter tries once more, and shows a traceback
            stdout.close()
        if isinstance(error, BrokenPipeError):
            raise
        raise OSError(error.errno, f"the output can't be written: {error.strerror}") from error
