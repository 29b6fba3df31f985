"""Check that output can be written, before any work is done."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from tritonq.deploy.files import atomic_file, remove_leftovers

_PROBE = "tritonq-probe"


def writable_folder(folder: Path) -> Path:
    """Return ``folder``; make it if it does not exist.

    Raises:
        OSError: it is a file, or nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(folder / _PROBE) as file:
            file.write(b"tritonq")
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, so that nothing can be written there", str(folder)) from error
    finally:
        with suppress(OSError):  # a read-only file system refuses this even where there is no such file
            (folder / _PROBE).unlink(missing_ok=True)
            remove_leftovers(folder / _PROBE)
    return folder


def writable_file(path: Path) -> Path:
    """Return ``path`` if a file can be written there.

    Raises:
        ValueError: it is a folder, or its folder does not exist.
        OSError: nothing can be written there.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder: make it first")
    writable_folder(path.parent)
    return path
