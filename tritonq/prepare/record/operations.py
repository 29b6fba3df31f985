"""Plain names of operations, and which modules count as one operation (leaves)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tritonq.nn import RepVGGBlock
from tritonq.prepare.record.float_types import has_own_parameters, inherits_computation, torch_base

# What these tell about a tensor does not depend on its elements, so reading it is no dataflow.
_METADATA_NAMES = """
    size dim ndim shape dtype device layout stride numel nelement len itemsize nbytes element_size storage_offset names
    requires_grad is_leaf grad_fn grad version get_device data_ptr hash type result_type is_contiguous is_same_size
    is_floating_point is_complex is_signed is_conj is_neg is_inference is_cuda is_cpu is_meta is_sparse is_quantized
    is_mkldnn is_mps is_nested is_xpu is_tensor iter
"""
METADATA = frozenset(_METADATA_NAMES.split())


def is_leaf(module: nn.Module) -> bool:
    """Whether the call of a module is recorded as one operation, so that nothing inside of it is recorded.

    True for modules of torch.nn without children, torch's multi-head attention, RepVGG blocks (not subclasses) and
    modules that torch.jit made. A user's subclass of one of torch.nn is a leaf if it inherits the computation
    unchanged. False for any other module with children, for empty containers, for ``nn.GLU``, and for a convolution or
    linear layer whose weight or bias a parametrization or hook computes: the calls in their forwards are recorded.
    """
    closed = isinstance(module, nn.MultiheadAttention) and inherits_computation(type(module), nn.MultiheadAttention)
    if closed or isinstance(module, torch.jit.ScriptModule) or type(module) is RepVGGBlock:
        return True
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or next(module.children(), None) is not None:
        return False
    if not has_own_weight(module) or isinstance(module, _OPEN):
        return False
    base = torch_base(type(module))
    return base not in (None, nn.Module) and inherits_computation(type(module), base)


# Their forwards call one function that becomes several operations.
_OPEN = (nn.GLU,)


def has_own_weight(module: nn.Module) -> bool:
    """Whether weight and bias of a convolution or linear layer are its own parameters; True for any other module.

    False if a parametrization or a hook computes one of the two.
    """
    return not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or has_own_parameters(module)


def in_transform() -> bool:
    """Whether the code that runs now is inside of `torch.vmap`, `torch.func.grad` or the like."""
    return torch._C._functorch.maybe_current_level() is not None


def operation_name(function: Callable[..., Any]) -> str:
    """Return the plain name of a function, the same for every way to write the operation.

    ``+``, ``+=``, ``torch.add`` and ``Tensor.add_`` all give ``"add"``; the attribute ``x.T`` gives ``"T"``.
    """
    name = str(getattr(function, "__name__", type(function).__name__))
    if name == "__get__":  # an attribute of Tensor, such as x.T
        return str(getattr(function, "__self__").__name__)  # noqa: B009 - a method wrapper has no static type
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = name.split(".")[0]
    # The operator module spells += as iadd.
    return plain_name(name, is_operator=getattr(function, "__module__", None) == "_operator")


# As torch.compiler.assume_constant_result does: the name that Dynamo of torch 2.14 gives for a function is no constant.
vars(operation_name)["_dynamo_marked_constant"] = True


def plain_name(name: str, is_operator: bool = False) -> str:
    """Return a name without underscores at its ends, and one name for all synonyms.

    An arithmetic operator also loses the prefix "i" or "r", if its name begins with two underscores or ``is_operator``
    is True. ``add_``, ``__iadd__`` and ``__radd__`` give ``"add"``; ``multiply`` gives ``"mul"``; ``bmm`` gives
    ``"matmul"``; ``max_pool2d`` stays.

    Args:
        name: name of a function or method.
        is_operator: whether it belongs to the module ``operator``, where ``iadd`` means ``+=`` and gives ``"add"`` too.
    """
    bare = name.strip("_")
    if (is_operator or name.startswith("__")) and bare[:1] in ("i", "r") and bare[1:] in _ARITHMETIC:
        bare = bare[1:]
    return _SYNONYMS.get(bare, bare)


_ARITHMETIC_NAMES = "add sub mul truediv floordiv div mod pow matmul and or xor lshift rshift concat"
_ARITHMETIC = frozenset(_ARITHMETIC_NAMES.split())
_SYNONYMS = {"truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub"}
_SYNONYMS |= {"concat": "cat", "concatenate": "cat", "floordiv": "floor_divide", "absolute": "abs", "rsub": "sub"}
_SYNONYMS |= {"bmm": "matmul", "mm": "matmul", "row_stack": "vstack"}
