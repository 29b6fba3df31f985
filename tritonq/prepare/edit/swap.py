"""The quantization-aware form of one float module, and the quantizer of what one module returns."""

from __future__ import annotations

from typing import Any

from torch import nn

from tritonq.prepare.edit.fuse import move_hooks
from tritonq.prepare.forwards.edited import apply_forward, quantizing_data
from tritonq.prepare.record.float_types import torch_base
from tritonq.qconfig import QConfig


def swap(
    module: nn.Module, target: type[nn.Module], qconfig: QConfig, kind: type[nn.Module] | None = None
) -> nn.Module:
    """Return the quantization-aware form of a float module: its parameters, attributes, hooks, device and mode.

    ``kind`` is the type that the module computes as, by default its own.
    """
    swapped: nn.Module = from_float(target, module if kind is None else plain_form(module, kind), qconfig)
    keep_attributes(module, swapped)
    move_hooks(module, module, swapped)
    return swapped


def plain_form(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return ``module`` as an object of ``kind``, one of its base classes, with the same state."""
    if type(module) is kind:
        return module
    plain = kind.__new__(kind)
    plain.__dict__.update(vars(module))
    return plain


def keep_attributes(module: nn.Module, made: nn.Module) -> None:
    """Give ``made`` the attributes of a float module that it lacks: users' code may read them.

    These are what the instance holds, and what its class holds besides methods.
    """
    for registry in ("_parameters", "_buffers"):
        for name, tensor in getattr(module, registry).items():
            if not hasattr(made, name):
                getattr(made, registry)[name] = tensor
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    base = torch_base(type(module))
    for kind in type(module).__mro__[: type(module).__mro__.index(base) if base else 0]:
        own = {**{name: value for name, value in vars(kind).items() if _is_data(name, value)}, **own}
    for name, value in own.items():
        if not hasattr(made, name):
            made.__dict__[name] = value


def _is_data(name: str, value: object) -> bool:
    return not name.startswith("_") and not callable(value) and not hasattr(value, "__get__")


def from_float(target: type[nn.Module], module: nn.Module, qconfig: QConfig) -> Any:
    """Call ``target.from_float(module)`` with ``qconfig`` as the module's attribute, where it is looked for."""
    had_own, before = "qconfig" in vars(module), vars(module).get("qconfig")
    module.qconfig = qconfig  # type: ignore[assignment]
    try:
        return target.from_float(module)  # type: ignore[attr-defined]
    finally:
        if had_own:
            module.qconfig = before  # type: ignore[assignment]
        else:
            del module.qconfig


def quantize_output(module: nn.Module, quantizer: nn.Module) -> None:
    """Pass the output of a module through ``quantizer``, its new child ``activation_post_process``."""
    name = "activation_post_process"
    module.add_module(name, quantizer.train(module.training))
    apply_forward(module, quantizing_data(returns=name))
