"""Find the qconfig of each module: from attributes of modules, from one qconfig for all, or from a mapping's rules."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import nn

from tritonq.prepare.record.dataflow import Dataflow
from tritonq.prepare.record.float_types import float_type
from tritonq.qconfig import QConfig
from tritonq.qconfig_mapping import QConfigMapping, check_qconfig

QConfigs = dict[nn.Module, QConfig | None]


def resolve_qconfigs(model: nn.Module, qconfig: QConfig | None) -> QConfigs:
    """Return the qconfig of every module: its own ``qconfig`` attribute, else that of the nearest module around it.

    The result is a dict from modules to qconfigs. An attribute that is None counts, too: it leaves its module in float.

    Args:
        model: the float model.
        qconfig: stands for the model's own attribute; None: that attribute counts, and without one modules get None.

    Raises:
        TypeError: a ``qconfig`` attribute that is neither a QConfig nor None.
    """
    return _with_attributes(dict.fromkeys(model.modules(), qconfig), model, skip_root=qconfig is not None)


def mapped_qconfigs(
    model: nn.Module, mapping: QConfigMapping, quantizable: Container[type[nn.Module]], flow: Dataflow | None
) -> QConfigs:
    """Return the qconfig of every module: the nearest ``qconfig`` attribute at or above it, else what ``mapping`` says.

    Args:
        model: the float model.
        mapping: the rules.
        quantizable: the float types that have a quantized form.
        flow: a record of the model, needed for rules about inputs and about the first and last layer; None: not
            recorded.

    Raises:
        ValueError: no rule, a rule that fits no module, one for inputs or the first or last layer without a record, or
            one for the first or last layer of a model that runs no quantizable layer.
        TypeError: a ``qconfig`` attribute that is neither a QConfig nor None.
    """
    if mapping.inputs is not None and flow is None:
        raise ValueError("the model's inputs are known from a run of it: pass example_inputs")
    order = None
    if mapping.needs_order and flow is not None:
        order = first_and_last(model, quantizable, flow)
    return _with_attributes(mapping.resolve(model, order), model)


def first_and_last(model: nn.Module, quantizable: Container[type[nn.Module]], flow: Dataflow) -> tuple[str, str]:
    """Return the names of the first and the last quantizable layer in order of execution.

    ``quantizable`` holds the module classes that count, ``flow`` is the record. Functions and the model itself do not
    count.

    Raises:
        ValueError: the record has no call of such a layer.
    """
    layers = [
        call.module_name
        for call in flow.calls
        if isinstance(call.target, nn.Module) and float_type(call.target, quantizable) and call.module_name
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} runs no quantizable layer, so there is no first or last one")
    return layers[0], layers[-1]


def _with_attributes(found: QConfigs, model: nn.Module, skip_root: bool = False) -> QConfigs:
    """Return ``found`` after ``qconfig`` attributes replaced its entries: each counts for its module and all in it.

    With ``skip_root`` the attribute of the model itself does not count.
    """
    visited: set[nn.Module] = set()

    def visit(module: nn.Module, name: str, above: tuple[QConfig | None] | None) -> None:
        if module in visited:
            return
        visited.add(module)
        if hasattr(module, "qconfig") and not (skip_root and module is model):
            own: Any = module.qconfig
            if own is not None:
                check_qconfig(own, f"qconfig of {name or 'the model'}")
            above = (own,)
        if above is not None:
            found[module] = above[0]
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}".lstrip("."), above)

    visit(model, "", None)
    return found
