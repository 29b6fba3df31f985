"""Tracing a model for a file along the path that was trained, where its forward takes another one for exporters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tritonq.deploy.outputs import takes_what
from tritonq.prepare.forwards.graph_data import traced_as_run


def trace_as_trained(traced: nn.Module) -> None:
    """Let a model compute the same values while it is traced as when it runs.

    Some forwards ask ``torch.onnx.is_in_onnx_export()`` and then compute the same by other operations, which were never
    prepared; it says no to them. Some make attention masks where they find themselves traced, in the place of the None
    that was recorded; masks that mask nothing.

    Args:
        traced: a model that has just run on the arguments that it is traced with; changed in place.
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
