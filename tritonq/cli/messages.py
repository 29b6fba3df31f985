"""Errors as text for the terminal, most of them in one line."""

from __future__ import annotations


def reason_of(error: BaseException) -> str:
    """Return why something failed, in one line.

    Of an OSError it is the reason without the file's name (``No such file or directory``). Of any other error, and of
    an OSError without such a reason, it is the message, with one space for each line break or run of spaces, or the
    name of the error's class if the message is empty.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def in_one_line(error: BaseException) -> str:
    """Return an error as one line: ``FILE: reason`` for an OSError that names a file, else what it says.

    Another OSError gives just its reason, such as ``No space left on device``. A message of several lines becomes one
    line, with a space for each run of white space. An error without a message gives the name of its class.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return reason_of(error)


def named(error: BaseException) -> str:
    """Return the class of an error and its message: ``KeyError: 'width'``. For errors of code that is not tritonq's.

    A message of several lines stays so; an error without a message gives the name of its class.
    """
    name = type(error).__name__
    return f"{name}: {str(error).rstrip()}".removesuffix(": ")
