"""Find the float type that a module computes as: its own class, or a base class whose computation it inherits.

A user's subclass of ``nn.Conv2d`` that only sets other defaults computes as ``nn.Conv2d``, so it can be quantized as
one.
"""

from __future__ import annotations

from collections.abc import Container

from torch import nn

# Methods that decide what a layer of torch.nn computes.
_COMPUTING = ("forward", "_conv_forward", "_output_padding", "__call__")


def float_type(module: nn.Module, known: Container[type[nn.Module]]) -> type[nn.Module] | None:
    """Return the type among ``known`` that a module computes as; None if it computes something else.

    That is the first known class in the module's ``__mro__``, provided that the module's class overrides no method that
    computes, and that its forward was not replaced on the instance.
    """
    for base in type(module).__mro__:
        if base in known:
            return base if inherits_computation(type(module), base) and "forward" not in vars(module) else None
    return None


def inherits_computation(kind: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether ``kind`` overrides none of the methods of ``base`` that compute a layer's result.

    These are ``forward``, ``_conv_forward``, ``_output_padding`` and ``__call__``. ``kind`` is ``base`` or a subclass.
    """
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in _COMPUTING)


def torch_base(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the first class of torch.nn that the class ``kind`` is or derives from, at last ``nn.Module`` itself.

    None if ``kind`` is no module.
    """
    return next((base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules.")), None)


def has_own_parameters(module: nn.Module) -> bool:
    """Whether weight and bias of a layer are its own parameters, not tensors that a parametrization or hook computes.

    Without a bias only the weight counts. False for a module without a weight.
    """
    weight, bias = module._parameters.get("weight"), getattr(module, "bias", None)
    return weight is not None and (bias is None or bias is module._parameters.get("bias"))
