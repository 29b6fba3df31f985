"""Warn, once per module, that its forward now runs otherwise than `prepare_qat` recorded it."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from tritonq.warn_once import warn_once

_TOLD = "_tritonq_told_missing"


def tell_once(owner: nn.Module, message: str) -> None:
    """Give the UserWarning ``message``, unless this function warned of the module ``owner`` before, by any message.

    A copy of ``owner`` counts as warned, too. Under ``torch.compile`` the warning comes while it traces, each time,
    since a compiled graph can't warn.
    """
    if torch.compiler.is_compiling():
        _warn(message)
    else:
        warn_once(owner, message, flag=_TOLD)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


# As torch.compiler.assume_constant_result does, which imports all of Dynamo.
_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
