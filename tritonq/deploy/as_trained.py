"""Tracing a model for a file in such a way that its forward computes as in training, although it asks who traces it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tritonq.deploy.outputs import takes_what
from tritonq.prepare.forwards.graph_data import traced_as_run


def trace_as_trained(traced: nn.Module) -> None:
    """Make a model compute the same operations while it is traced for export as when it runs.

    Some forwards ask ``torch.onnx.is_in_onnx_export()`` and then compute by other operations, which were never
    prepared: inside ``traced`` it returns False. Some make an attention mask if they are traced, one that masks
    nothing, where None was recorded: that is prevented, too.

    Args:
        traced: a model that has just run on the arguments it will be traced with; the attribute ``forward`` of this
            object is set to a function with the same signature.
    """
    forward = traced.forward

    @takes_what(forward)
    def as_trained(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # which can trace neither
            return forward(*args, **kwargs)
        with traced_as_run(), _no_onnx_export():
            return forward(*args, **kwargs)

    traced.forward = as_trained


@contextmanager
def _no_onnx_export() -> Iterator[None]:
    from torch.onnx._internal.exporter import _flags

    before = _flags._is_onnx_exporting
    _flags._is_onnx_exporting = False
    try:
        yield
    finally:
        _flags._is_onnx_exporting = before
