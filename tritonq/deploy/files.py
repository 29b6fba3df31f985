"""Writing files that are whole or absent: written under another name, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file that gets the name ``path`` when the block ends, and is removed if the block raises.

    A process that is killed in between leaves the old file as it was, and beside it one that :func:`remove_leftovers`
    deletes.

    Raises:
        OSError: the file can't be written; the error names it.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} can't be written: {target.parent} is not a folder")
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(target)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror and error.filename is None:
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Delete the unfinished files that killed writers of ``path`` left beside it."""
    target = Path(path)
    for leftover in target.parent.glob(f".{target.name}.*"):
        leftover.unlink(missing_ok=True)


def _umask() -> int:
    """Return the process's umask. The system returns it only when it is set, so it is set to 0 and back."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
