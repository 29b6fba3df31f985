"""Writing files that are whole or absent (written under another name, then renamed), and why files can't be read."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a new binary file for the block; when it ends the file is named ``path``, and if it raises it is removed.

    A file that has this name is replaced. A process that is killed in between leaves it as it was, and beside it one
    that :func:`remove_leftovers` deletes.

    Raises:
        OSError: the file can't be written; the error names it or its unfinished file (FileNotFoundError: its folder is
            missing).
    """
    with atomic_files(path) as (file,):
        yield file


@contextmanager
def atomic_files(*paths: str | os.PathLike[str]) -> Iterator[list[IO[bytes]]]:
    """Open binary files for the block; when it ends they get the names ``paths``, and if it raises they are removed.

    The block gets them in the order of ``paths``. No file gets its name before all are written. Files that have these
    names are replaced. If one can't be named, those named before it stay.

    Raises:
        OSError: a file can't be written; the error names it or its unfinished file (FileNotFoundError: its folder is
            missing).
    """
    targets = [Path(path) for path in paths]
    for target in targets:
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target} can't be written: {target.parent} is not a folder")
    temporaries: list[Path] = []
    try:
        with ExitStack() as stack:
            files: list[IO[bytes]] = []
            for target in targets:
                handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
                temporaries.append(Path(temporary))
                files.append(stack.enter_context(os.fdopen(handle, "wb")))
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for written, target in zip(temporaries, targets, strict=True):
            written.chmod(0o666 & ~_umask())
            written.replace(target)
    except BaseException as error:
        for written in temporaries:
            written.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror and error.filename is None:
            raise OSError(error.errno, error.strerror, ", ".join(map(str, targets))) from error
        raise


def save_atomically(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` to the file ``path`` by ``torch.save``, whole or not at all; on an error an older one stays.

    Raises:
        OSError: the file can't be written; the error names it.
    """
    try:
        with atomic_file(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's writer hides the reason
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{os.fspath(path)} can't be written: {_first_line(reason)}") from error


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Delete the unfinished files that killed writers of ``path`` left beside it.

    They are known by the names that :func:`atomic_files` gives: a dot, the name of ``path``, a dot and eight characters
    of a-z, 0-9 and ``_``. ``path`` itself stays. The unfinished file of a writer that still runs is deleted, too: call
    this while none runs.

    Raises:
        OSError: a file can't be deleted.
    """
    target = Path(path)
    temporary = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}")  # as tempfile.mkstemp names them
    for beside in target.parent.glob(".*"):
        if temporary.fullmatch(beside.name):
            beside.unlink(missing_ok=True)


def why_unread(error: BaseException) -> str:
    """Return in one line why ``torch.load(..., weights_only=True)`` refused a file, by the ``error`` that it raised.

    The line is such as ``"Permission denied"`` or ``"it is damaged, or no file that torch.save wrote"``. torch's own
    text advises to load the file without ``weights_only``, which would run the code in it.
    """
    # A position outside of the file, for which a cut file asks, is no fault of the system.
    if isinstance(error, OSError) and error.strerror and error.errno != errno.EINVAL:
        return error.strerror
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused is not None:
        return (
            f"it holds an object of {refused[1]}, and only tensors and plain data are read, since objects could run "
            "code: save the model's state_dict() in place of the model"
        )
    if "TorchScript" in text:
        return "it is a TorchScript program: save the model's state_dict() with torch.save"
    return "it is damaged, or no file that torch.save wrote"


def _umask() -> int:
    """Return the process's umask. The system returns it only when it is set, so it is set to 0 and back."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
