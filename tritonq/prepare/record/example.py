"""The recorded run of a model on its example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tritonq.prepare.record.dataflow import Dataflow
from tritonq.prepare.record.recorder import Recorder

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Recording:
    """A run of a model, and what it was called with.

    Attributes:
        flow: its dataflow.
        args: positional arguments.
        kwargs: named arguments.
        result: what the model returned.
    """

    flow: Dataflow
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


def record_examples(model: nn.Module, example_inputs: Any) -> Recording:
    """Run a model once on its example inputs, in eval mode and without gradients, and record it.

    Raises:
        ValueError: the model rejects them.
        TypeError: they are neither a tensor nor a tuple nor a dict.
    """
    args, kwargs = example_arguments(example_inputs)
    recorder = Recorder(model)
    try:
        flow = recorder.run(args, kwargs)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} rejects example_inputs: {type(error).__name__}: {error}") from error
    return Recording(flow, args, kwargs, recorder.result)


def example_arguments(example_inputs: Any) -> Arguments:
    """Positional and named arguments: of a tensor, a sequence of positional arguments or a mapping of named ones.

    Raises:
        TypeError: anything else.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    raise TypeError(
        "example_inputs must be a tensor, a tuple of positional arguments or a dict of named ones, got "
        f"{type(example_inputs).__qualname__}"
    )
