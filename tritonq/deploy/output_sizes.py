"""Transposed convolutions that callers give an output size: a file holds one output padding for each."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import nn

from tritonq.deploy.outputs import result_of
from tritonq.nn.conv import TakesOutputSize
from tritonq.prepare.record.example import example_arguments
from tritonq.prepare.record.snapshot import copied
from tritonq.prepare.record.structure import clone_tensors


def with_output_sizes(deployed: nn.Module, example_inputs: Any) -> nn.Module:
    """Return a model whose transposed convolutions have the output paddings that a run on the example needs.

    It is ``deployed`` itself if all have them already, or if there are none, else a copy.

    Args:
        deployed: the converted model, which runs on copies of the example inputs.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of named ones.

    Raises:
        TypeError: ``example_inputs`` are something else.
        ValueError: the run needs several output paddings of one layer, or the model raises an error.
    """
    layers = {name: module for name, module in deployed.named_modules() if isinstance(module, TakesOutputSize)}
    if not layers:
        return deployed
    asked: dict[str, set[tuple[int, ...]]] = {name: set() for name in layers}
    hooks = [layer.register_forward_hook(partial(_note, asked[name])) for name, layer in layers.items()]
    try:
        result_of(deployed, *clone_tensors(*example_arguments(example_inputs)))
    finally:
        for hook in hooks:
            hook.remove()
    if all(paddings <= {layers[name].output_padding} for name, paddings in asked.items()):
        return deployed
    model = copied(deployed)
    for name, paddings in asked.items():
        if len(paddings) > 1:
            raise ValueError(
                f"{name!r} is called with sizes of its result that need the output paddings {sorted(paddings)}, and a "
                "file holds one: call it on inputs of sizes that differ alike"
            )
        layer = cast(TakesOutputSize, model.get_submodule(name))
        layer.output_padding = paddings.pop() if paddings else layer.output_padding
    return model


def _note(paddings: set[tuple[int, ...]], layer: Any, args: Any, result: Any) -> None:
    paddings.add(tuple(layer.output_padding))
