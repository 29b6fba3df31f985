"""Which known float type a module computes as: its own class, or the base class whose computation it inherits."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

# Methods that decide what a layer of torch.nn computes.
_COMPUTING = ("forward", "_conv_forward", "_output_padding", "__call__")


def float_type(module: nn.Module, known: Container[type[nn.Module]]) -> type[nn.Module] | None:
    """Return the type among ``known`` whose computation the module's class inherits unchanged, or None.

    A class that only constructs (other defaults, other arguments, further attributes) computes as its base.
    """
    for base in type(module).__mro__:
        if base in known:
            return base if inherits_computation(type(module), base) and "forward" not in vars(module) else None
    return None


def inherits_computation(kind: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a class computes what its base does: none of the methods that matter was overridden."""
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in _COMPUTING)


def torch_base(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the first class of torch.nn that a class is or derives from, or None."""
    return next((base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules.")), None)


def has_own_parameters(module: nn.Module) -> bool:
    """Whether weight and bias of a layer are parameters of its own, not tensors that something computes."""
    weight, bias = module._parameters.get("weight"), getattr(module, "bias", None)
    return weight is not None and (bias is None or bias is module._parameters.get("bias"))
