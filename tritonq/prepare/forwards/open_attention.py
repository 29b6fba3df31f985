"""Let torch's multi-head attention compute by operations that can be recorded and quantized, subclasses included."""

from __future__ import annotations

from contextlib import suppress

from torch import nn

from tritonq.nn.attention import MultiheadAttention
from tritonq.nn.kept_class import joined_class
from tritonq.nn.original_class import original_class
from tritonq.prepare.record.float_types import inherits_computation


def compute_openly(model: nn.Module) -> None:
    """Call :func:`open_attention` for every module of ``model``."""
    for module in model.modules():
        open_attention(module)


def open_attention(module: nn.Module) -> None:
    """Give ``module`` the class :class:`~tritonq.nn.attention.MultiheadAttention`, in place, if it computes as torch's.

    That is so for ``nn.MultiheadAttention`` and for subclasses that inherit its forward; they stay of their class, too.
    Any other module stays as it is.
    """
    kind = original_class(module)
    is_open = issubclass(kind, MultiheadAttention) or kind is not type(module)
    if is_open or not issubclass(kind, nn.MultiheadAttention) or not inherits_computation(kind, nn.MultiheadAttention):
        return
    with suppress(TypeError):  # some classes can't have a common subclass
        made = MultiheadAttention if kind is nn.MultiheadAttention else joined_class(MultiheadAttention, kind)
        module.__class__ = made
