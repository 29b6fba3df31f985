"""Stacks: concatenations along a new axis."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tritonq.nn.elementwise import Cat


class Stack(Cat):
    """``FQ(stack(tensors, dim))``: all parts on one grid, as :class:`Cat` rounds them.

    Examples:
        >>> import torch, tritonq
        >>> stack = tritonq.nn.Stack(1, qconfig=tritonq.get_qconfig())
        >>> stack([torch.rand(2, 3), torch.rand(2, 3)]).shape
        torch.Size([2, 2, 3])
    """

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensors along a new axis ``dim``, fake-quantized."""
        return super().forward([tensor.unsqueeze(self.dim) for tensor in tensors])
