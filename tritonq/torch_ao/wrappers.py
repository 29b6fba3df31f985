"""torch.ao's eager helpers: stubs around a module, and qconfigs and swaps by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tritonq.nn import DEFAULT_QAT_MAPPING, DeQuantStub, QuantStub
from tritonq.prepare.edit.swap import swap
from tritonq.qconfig import QConfig


class QuantWrapper(nn.Module):
    """A module between two stubs: its input is quantized before it, its result leaves as float.

    The stubs get the training mode of the module and, if it has one, its ``qconfig``.

    Attributes:
        quant: the stub before.
        module: the module.
        dequant: the stub behind.

    Source: torch.ao.quantization.QuantWrapper.

    Examples:
        >>> list(dict(QuantWrapper(nn.Linear(3, 2)).named_children()))
        ['quant', 'dequant', 'module']
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        qconfig = getattr(module, "qconfig", None)
        self.quant, self.dequant = QuantStub(qconfig), DeQuantStub(qconfig)
        self.module = module
        self.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``dequant(module(quant(x)))``."""
        result: Tensor = self.dequant(self.module(self.quant(x)))
        return result


def add_quant_dequant(module: nn.Module) -> nn.Module:
    """Wrap each part without children that has a qconfig of its own in a :class:`QuantWrapper`, in place.

    Returns:
        ``module``, or its wrapper where it has no children itself.

    Source: torch.ao.quantization.add_quant_dequant.

    Examples:
        >>> import tritonq
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> model[0].qconfig = tritonq.get_default_qat_qconfig("x86")
        >>> [type(part).__name__ for part in add_quant_dequant(model)]
        ['QuantWrapper', 'ReLU']
    """
    children = [(name, child) for name, child in module.named_children() if name != "parametrizations"]
    if not children and getattr(module, "qconfig", None):
        return QuantWrapper(module)
    for name, child in children:
        module._modules[name] = add_quant_dequant(child)
    return module


def propagate_qconfig_(
    module: nn.Module, qconfig_dict: Mapping[Any, QConfig | None] | None = None, prepare_custom_config_dict: None = None
) -> None:
    """Give every part of a model a ``qconfig``: its own, else that of its name or type in the dict, else its parent's.

    A ``qconfig`` attribute that a part has already stays, None included. A part that none of these fits gets None,
    which leaves it in float.

    Args:
        module: the model; changed in place.
        qconfig_dict: qconfigs by path such as ``"layer1.0"`` (``""`` is the model), which wins, or by exact module
            class. None: no entries.
        prepare_custom_config_dict: must be None.

    Raises:
        ValueError: a custom config, which has no counterpart.

    Source: ``torch.ao.quantization.propagate_qconfig_``.

    Examples:
        >>> import tritonq
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> propagate_qconfig_(model, {nn.Linear: tritonq.get_default_qat_qconfig("x86")})
        >>> model[0].qconfig.target, model[1].qconfig
        ('x86', None)
    """
    if prepare_custom_config_dict:
        raise ValueError("prepare_custom_config_dict has no counterpart; qconfig_dict takes names and types")
    _propagate(module, "", qconfig_dict or {}, None)


def _propagate(module: nn.Module, name: str, qconfigs: Mapping[Any, QConfig | None], inherited: QConfig | None) -> None:
    found = getattr(module, "qconfig", qconfigs.get(name, qconfigs.get(type(module), inherited)))
    module.qconfig = found  # type: ignore[assignment]
    for child, part in module.named_children():
        _propagate(part, f"{name}.{child}" if name else child, qconfigs, found)


def swap_module(
    mod: nn.Module,
    mapping: Mapping[type[nn.Module], type[nn.Module]] | None = None,
    custom_module_class_mapping: Mapping[type[nn.Module], type[nn.Module]] | None = None,
) -> nn.Module:
    """Return the quantization-aware form of a module that has a qconfig.

    It shares the module's parameters, and takes its hooks: ``mod`` has none afterwards. The module itself is returned
    if its ``qconfig`` is None or missing, or if its exact type has no such form.

    Args:
        mod: a float module.
        mapping: float type to quantization-aware type; None: :func:`get_default_qat_module_mappings`.
        custom_module_class_mapping: more of these, which win over ``mapping``; None: no more.

    Raises:
        TypeError: ``mod.qconfig`` is neither None nor a QConfig.

    Source: torch.ao.quantization.swap_module.

    Examples:
        >>> import tritonq
        >>> linear = nn.Linear(3, 2)
        >>> linear.qconfig = tritonq.get_default_qat_qconfig("x86")
        >>> type(swap_module(linear))
        <class 'tritonq.nn.linear.Linear'>
    """
    types = {**(DEFAULT_QAT_MAPPING if mapping is None else mapping), **(custom_module_class_mapping or {})}
    qconfig = getattr(mod, "qconfig", None)
    return mod if qconfig is None or type(mod) not in types else swap(mod, types[type(mod)], qconfig)
