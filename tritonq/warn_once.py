"""Warnings that each module gives at most once."""

from __future__ import annotations

import warnings

_FLAG = "_warned"


def warn_once(
    owner: object, text: str, category: type[Warning] = UserWarning, stacklevel: int = 1, flag: str = _FLAG
) -> None:
    """Give the warning ``text`` unless ``owner`` has given one before under the same ``flag``.

    The memory is an attribute of ``owner`` and lives as long; copies and pickles of ``owner`` carry it along.

    Args:
        owner: the module that warns.
        text: the warning.
        category: of the warning.
        stacklevel: as in ``warnings.warn``, counted from the caller.
        flag: name of the attribute; warnings with another one are remembered apart.
    """
    if not getattr(owner, flag, False):
        setattr(owner, flag, True)
        warnings.warn(text, category, stacklevel=stacklevel + 1)


def silence(owner: object) -> None:
    """Mark ``owner`` as having warned: :func:`warn_once` gives it no warning under the default ``flag``.

    Calibration does this to quantizers that it runs in eval mode, where they would warn that they saw no data.
    """
    setattr(owner, _FLAG, True)
