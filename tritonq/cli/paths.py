"""Check that output can be written, before any work is done."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tritonq.deploy.files import atomic_file, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PROBE = "tritonq-probe"
# Descriptors of held folders, which processes that are forked from this one do not hold.
_held: set[int] = set()


def writable_folder(folder: Path) -> Path:
    """Return ``folder``; make it, and the folders above it, if it does not exist.

    Raises:
        OSError: it is a file, can't be made, or nothing can be written there.
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
    """Return ``path`` if a file can be written there; one that exists stays as it is.

    Raises:
        ValueError: it is a folder, or its folder does not exist.
        OSError: nothing can be written in its folder.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder: make it first")
    writable_folder(path.parent)
    return path


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Hold a folder while the block of ``with`` runs, so that no other run can hold it, and write there.

    It is free again when the block or the process ends, also if the process is killed.

    Where folders can't be locked, on Windows and some network file systems, nothing is held.

    Raises:
        ValueError: the folder is held already, by another process or by this one.
        OSError: there is no such folder, or it can't be opened.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another run writes to {folder} now: wait until it ends, or pass another --output"
            raise ValueError(message) from None
        except OSError:
            pass
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _let_go() -> None:
    """Close in a forked process what the parent holds: the lock would outlive a parent that is killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)
