"""Copies of values, so that a backward pass which ``torch.compile`` makes finds them unchanged.

A compiler may compute a value again in the backward pass instead of keeping it. It then reads the inputs after the
forward pass has moved a running range or a running variance (torch 2.13 does so with any buffer that its graph updates,
without a word). What an operator derives from such a buffer it therefore derives from a copy that no compiler makes
twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy

_LIBRARY = torch.library.Library("tritonq", "FRAGMENT")
_LIBRARY.define("remember(Tensor[] values) -> Tensor[]")


def _remember(values: list[Tensor]) -> list[Tensor]:
    return [value.clone() for value in values]


_LIBRARY.impl("remember", _remember, "CompositeExplicitAutograd")


def remember(*values: Tensor) -> list[Tensor]:
    """Return a list with a copy of each value, made by one operator that compilers can't see into.

    So no compiler computes a value again in the backward pass, after what it follows from has changed. Meant for values
    that need no gradient: a backward pass through the operator warns.
    """
    copies: list[Tensor] = torch.ops.tritonq.remember(list(values))
    return copies


@contextmanager
def made_again() -> Iterator[None]:
    """Mark what is computed in the block: the backward pass computes it again, instead of keeping its tensors.

    A compiler does so with everything that it traces in the block, by the mark of activation checkpointing. Outside of
    a trace the block changes nothing. Meant for elementwise work on tensors that are kept anyhow.
    """
    meta = traceback.get_current_meta() if traceback.has_preserved_node_meta() else {}
    before = meta.get("recompute")
    meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    try:
        yield
    finally:
        if before is None:
            meta.pop("recompute")
        else:
            meta["recompute"] = before
