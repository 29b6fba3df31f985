"""Names of an ONNX file's outputs: the keys under which the model returns them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tritonq.prepare.record.snapshot import preserved_random_state
from tritonq.prepare.record.structure import Path, tensors_in

_DEFAULT = "output"


def output_paths(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Path]:
    """Run a model and return for each tensor of its result the keys that lead to it."""
    with torch.no_grad(), preserved_random_state(model):
        return [path for path, _ in tensors_in(model(*args, **kwargs))]


def output_name(path: Path) -> str:
    """Return the name of an output.

    Examples:
        >>> output_name(()), output_name((1,)), output_name(("boxes",)), output_name(("scores", 0))
        ('output', 'output_1', 'boxes', 'scores_0')
    """
    parts = path if path and isinstance(path[0], str) else (_DEFAULT, *path)
    return re.sub(r"\W", "_", "_".join(map(str, parts)))


def name_outputs(model: Any, paths: Sequence[Path]) -> None:
    """Name the outputs of an exported model, unless the exporter counts them otherwise than :func:`output_paths`.

    A tensor that is an input too, or an output twice, keeps its name.
    """
    outputs = list(model.graph.outputs)
    if len(outputs) != len(paths):
        return
    taken = {value.name for value in model.graph.inputs}
    for value, path in zip(outputs, paths, strict=True):
        name = output_name(path)
        if value.name in taken:
            continue
        value.name = name if name not in taken else f"{_DEFAULT}_{name}"
        taken.add(value.name)
