"""Make the quantization-aware form of one float module, and quantize the output of one module."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import nn

from tritonq.nn.kept_class import keep_class, made_class, users_class
from tritonq.prepare.edit.fuse import move_hooks
from tritonq.prepare.forwards.edited import apply_forward, quantizing_data
from tritonq.prepare.record.float_types import torch_base
from tritonq.qconfig import QConfig


def swap(
    module: nn.Module, target: type[nn.Module], qconfig: QConfig, kind: type[nn.Module] | None = None
) -> nn.Module:
    """Return the quantization-aware form of a float module, with its parameters, attributes, hooks, device and mode.

    Parameters are shared. Forward and backward hooks move: ``module`` has none afterwards. Of the public attributes the
    result gets those that it lacks (:func:`take_place`). The caller puts the result into the parent.

    Args:
        module: the float module.
        target: the quantization-aware type.
        qconfig: what makes the quantizers.
        kind: the float type that the module computes as, if it is of a subclass; None: its own type.
    """
    swapped: nn.Module = from_float(target, module if kind is None else plain_form(module, kind), qconfig)
    take_place(module, swapped)
    move_hooks(module, module, swapped)
    return swapped


def plain_form(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return ``module`` as an object of its base class ``kind``; ``module`` itself if its class is exactly ``kind``.

    The new object shares the parameters, buffers, children and hooks of ``module``, and the dicts that hold them. It
    has the same attributes. ``module`` is not changed.
    """
    if type(module) is kind:
        return module
    plain = kind.__new__(kind)
    plain.__dict__.update(vars(module))
    return plain


def take_place(module: nn.Module, made: nn.Module) -> None:
    """Give the replacement of a float module what the user's code may read of that module.

    That is public attributes, parameters and buffers that the replacement lacks. If the user's class has public methods
    or properties that it lacks, the replacement becomes of that class as well.

    Args:
        module: the float module.
        made: its replacement, changed in place.
    """
    keep_attributes(module, made)
    if _adds_methods(type(module), made):
        keep_class(type(module), made)


def take_place_again(module: nn.Module, made: nn.Module) -> None:
    """Hand on what a module has of the float model to the module that takes its place in turn.

    ``module`` replaced a float module, and :func:`take_place` gave it attributes, parameters and buffers of that one.
    ``made`` gets those that it lacks, the same objects. If ``module`` is also of the float module's class, so is
    ``made``.

    Args:
        module: the module that is replaced now, such as a quantization-aware layer.
        made: its replacement, such as the layer with integer weights; changed in place.
    """
    names = kept_names(module)
    for source, registry in zip(_registries(module), _registries(made), strict=True):
        registry.update({name: source[name] for name in names if name in source and not hasattr(made, name)})
    made.__dict__[_KEPT] = names
    if users_class(module) is not made_class(module):
        keep_class(users_class(module), made)


def kept_names(made: nn.Module) -> tuple[str, ...]:
    """Return names of the attributes, parameters and buffers that a module has from the one that it replaced.

    For example ``("temperature",)``. ``made`` is the replacement; ``()`` if it replaced none or lacked nothing.
    """
    names: tuple[str, ...] = made.__dict__.get(_KEPT, ())
    return names


def keep_attributes(module: nn.Module, made: nn.Module, without: Container[str] = ()) -> None:
    """Give ``made`` the attributes of a float module that it lacks, since the user's code may read them.

    These are its parameters, buffers and public attributes (the same objects; no children), and public data of its
    classes below torch's, without methods and properties.

    Args:
        module: the float module.
        made: what takes its place.
        without: names of attributes, parameters and buffers that ``made`` does not get.
    """
    parameters, buffers, own = _registries(module)
    own = {name: value for name, value in own.items() if not name.startswith("_")}
    for kind in _users_classes(type(module)):
        own = {**{name: value for name, value in vars(kind).items() if _is_data(name, value)}, **own}
    kept = []
    for source, registry in zip((parameters, buffers, own), _registries(made), strict=True):
        lacking = [name for name in source if name not in without and not hasattr(made, name)]
        registry.update({name: source[name] for name in lacking})
        kept += lacking
    made.__dict__[_KEPT] = tuple(kept)


_KEPT = "_tritonq_kept"


def _adds_methods(kind: type[nn.Module], made: nn.Module) -> bool:
    """Whether the user's class ``kind`` has public methods or properties that ``made`` lacks."""
    names = {name for part in _users_classes(kind) for name, value in vars(part).items() if not _is_data(name, value)}
    return any(not name.startswith("_") and not hasattr(type(made), name) for name in names)


def _users_classes(kind: type[nn.Module]) -> tuple[type, ...]:
    """Return the class ``kind`` and its bases, in the order of inheritance, up to the first class of torch.nn."""
    base = torch_base(kind)
    return kind.__mro__[: kind.__mro__.index(base)] if base else ()


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return the dicts of a module's parameters, buffers and attributes."""
    return module._parameters, module._buffers, module.__dict__


def _is_data(name: str, value: object) -> bool:
    """Whether a class attribute is public and neither a method nor a property."""
    return not name.startswith("_") and not callable(value) and not hasattr(value, "__get__")


def from_float(target: type[nn.Module], module: nn.Module, qconfig: QConfig) -> Any:
    """Return ``target.from_float(module)``, a new module of the class ``target``.

    Meanwhile ``qconfig`` is an attribute of ``module``; then ``module`` has its own ``qconfig`` again, or none.
    Errors of ``target.from_float``, such as ValueError for a layer that it can't quantize, pass through.
    """
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
    """Let a module pass its output through ``quantizer``, which becomes its child ``activation_post_process``.

    The module is changed in place, and ``quantizer`` gets its mode, training or eval. An output that is no
    floating-point tensor stays as it is. Edits that the module's forward had are replaced (:func:`apply_forward`).
    """
    name = "activation_post_process"
    module.add_module(name, quantizer.train(module.training))
    apply_forward(module, quantizing_data(returns=name))
