"""Which qconfig each module gets, where a mapping chooses."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import nn

from tritonq.prepare.automatic import _arguments
from tritonq.prepare.dataflow import record
from tritonq.prepare.eager import QConfigs
from tritonq.qconfig import QConfig
from tritonq.qconfig_mapping import QConfigMapping


def mapped_qconfigs(
    model: nn.Module, mapping: QConfigMapping, quantizable: Container[type[nn.Module]], example_inputs: Any
) -> QConfigs:
    """The qconfig of every module: the nearest ``qconfig`` attribute at or above it, else what ``mapping`` says.

    Args:
        model: the float model.
        mapping: the rules.
        quantizable: the float types that have a quantized form.
        example_inputs: as for ``prepare_qat``; needed for rules about the first and last layer.

    Raises:
        ValueError: a rule that fits no module, or a model that rejects the example inputs.
        TypeError: a ``qconfig`` attribute that is neither a QConfig nor None.
    """
    order = None
    if mapping.needs_order and example_inputs is not None:
        order = first_and_last(model, quantizable, example_inputs)
    found = mapping.resolve(model, order)

    def visit(module: nn.Module, name: str, above: tuple[QConfig | None] | None) -> None:
        if hasattr(module, "qconfig"):
            own: Any = module.qconfig
            if own is not None and not isinstance(own, QConfig):
                kind = type(own).__qualname__
                raise TypeError(f"qconfig of {name or 'the model'} must be a QConfig or None, got {kind}")
            above = (own,)
        if above is not None:
            found[module] = above[0]
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}".lstrip("."), above)

    visit(model, "", None)
    return found


def first_and_last(model: nn.Module, quantizable: Container[type[nn.Module]], example_inputs: Any) -> tuple[str, str]:
    """Names of the first and the last quantizable layer in order of execution.

    Raises:
        ValueError: the model rejects the example inputs, or runs no quantizable layer.
    """
    args, kwargs = _arguments(example_inputs)
    try:
        flow = record(model, args, kwargs)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} rejects example_inputs: {type(error).__name__}: {error}") from error
    layers = [call.module_name for call in flow.calls if type(call.target) in quantizable and call.module_name]
    if not layers:
        raise ValueError(f"{type(model).__name__} runs no quantizable layer, so there is no first or last one")
    return layers[0], layers[-1]
