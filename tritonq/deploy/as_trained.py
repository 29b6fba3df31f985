"""Trace a model for a file so that its forward computes as in training, even if it asks whether an export runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tritonq.deploy.example_inputs import name_keywords, open_axes
from tritonq.deploy.outputs import result_of, takes_what
from tritonq.prepare.forwards.graph_data import traced_as_run
from tritonq.prepare.record.example import Arguments, example_arguments


def ready_to_trace(
    traced: nn.Module, deployed: nn.Module, example_inputs: Any, batch: bool, sizes: bool = False
) -> tuple[Arguments, dict[str, Any] | None, Any]:
    """Make a rewritten model ready for torch.export; return ``(arguments, shapes, result)``.

    ``arguments`` are those of the example, with a batch of one doubled if the batch is to be open; ``shapes`` is
    torch.export's ``dynamic_shapes``, None if no axis is to be open; ``result`` is what the deployed model returns for
    these arguments.

    A function that calls the old ``traced.forward`` takes its place; it has a named parameter for each argument that
    went to ``**kwargs``. In that call ``torch.onnx.is_in_onnx_export()`` is False, and a mask that a forward makes only
    while it is traced is accepted where None was recorded; neither holds while Dynamo traces.

    Args:
        traced: the rewritten model: a copy of ``deployed`` in operators to export; its ``forward`` is replaced.
        deployed: the model that it was made of, which runs once.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of named ones.
        batch: whether axis 0 of the inputs is open: the exported file takes any size there.
        sizes: whether the axes behind the first two are open.

    Raises:
        ValueError: the deployed model raises an error on the arguments, or an axis is to be open and no tensor has an
            axis 0.
        TypeError: ``example_inputs`` are none of these, or an axis is to be open and the forward does not take them.
    """
    arguments = example_arguments(example_inputs)
    name_keywords(traced, arguments[1])
    arguments, shapes = open_axes(traced.forward, arguments, batch, sizes)
    result = result_of(deployed, *arguments)
    _trace_as_trained(traced)
    return arguments, shapes, result


def _trace_as_trained(traced: nn.Module) -> None:
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
