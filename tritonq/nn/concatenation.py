"""Concatenations and stacks with a quantizer of their own.

FQ in formulas is fake quantization: rounding to a grid, as a float tensor. In eval mode integer runtimes are followed,
which round ``round(x / s) · s`` with the output's scale s; training multiplies by ``1 / s``, which rounds some ties to
the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.codes import can_use_codes
from tritonq.functional.functions import concatenated_codes
from tritonq.functional.gradients import needs_gradient, with_gradient_of
from tritonq.functional.integer_joins import integer_concatenation
from tritonq.functional.residual import rounded_result
from tritonq.nn.fusable import observed_grid, warn_if_unobserved
from tritonq.nn.output_quantizer import WithOutputQuantizer, is_grid_source
from tritonq.qconfig import QConfig

# torch's functions that concatenate.
Arrangement: TypeAlias = Literal["cat", "stack", "hstack", "vstack", "dstack", "column_stack"]


class Cat(WithOutputQuantizer):
    """``FQ(cat(tensors, dim))``, or the same of a stack: the parts lie on one grid.

    In training the quantizer observes the result. In eval mode values are rounded as ``round(x / s) · s`` and clipped.

    Args:
        dim: the axis along which to concatenate; for ``"stack"`` the place of the new axis; not used by ``"hstack"``
            and the like, whose axis is fixed.
        arrangement: name of torch's function: "cat", "stack", "hstack", "vstack", "dstack" or "column_stack".
        qconfig: makes the quantizer of the output; None: the output stays in float.

    Examples:
        >>> import torch, tritonq
        >>> cat = tritonq.nn.Cat(1, qconfig=tritonq.get_qconfig())
        >>> cat([torch.rand(2, 3), torch.rand(2, 1)]).shape
        torch.Size([2, 4])
    """

    arrangement: Arrangement = "cat"  # of models that earlier versions pickled

    def __init__(self, dim: int = 0, *, arrangement: Arrangement = "cat", qconfig: QConfig | None = None) -> None:
        super().__init__(qconfig)
        if arrangement not in get_args(Arrangement):
            raise ValueError(f"arrangement must be one of {', '.join(get_args(Arrangement))}, got {arrangement!r}")
        self.dim, self.arrangement = dim, arrangement

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the fake-quantized concatenation of ``tensors``, in shape and dtype as torch's function returns it."""
        tensors, dim = _arranged(tuple(tensors), self.dim, self.arrangement)
        exact = None if self.training else self._exact(tensors, dim)
        if exact is not None:
            if needs_gradient(self, *tensors):
                exact = with_gradient_of(exact, torch.cat(tensors, dim))
            return cast(Tensor, self.activation_post_process(exact))
        y = torch.cat(tensors, dim)
        observed = observed_grid(self.activation_post_process, y)
        if observed is None or observed[0].qtype.axis is not None or not y.is_floating_point():
            return cast(Tensor, self.activation_post_process(y))
        y = rounded_result(y, *observed, None)
        warn_if_unobserved(self.activation_post_process)
        return y

    @torch.no_grad()
    def _exact(self, tensors: tuple[Tensor, ...], dim: int) -> Tensor | None:
        """Return ``round(cat(tensors, dim) / s) · s`` with the output's scale s, before clipping, without gradient.

        Tensors to which their codes are attached are joined as codes, with the same values, then clipped. None without
        a per-tensor grid that is switched on. A graph of ``torch.compile`` reads the switch when it runs; values then
        stay as they are if it is off.
        """
        output = self.activation_post_process
        if not is_grid_source(output) or output.qtype.axis is not None:
            return None
        if torch.compiler.is_compiling() and isinstance(output, FakeQuantizeBase):
            from tritonq.functional.traced import eval_mode

            return eval_mode.on_grid(torch.cat(tensors, dim), output.grid())
        if not output.is_enabled_on_host():
            return None
        grid = output.grid()
        if all(map(can_use_codes, tensors)):
            joined = concatenated_codes(tensors, dim, grid)
            if joined is not None:
                return joined
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        return integer_concatenation(tensors, dim, grid).to(dtype)

    def extra_repr(self) -> str:
        """Return the text for ``repr``: ``"dim=1"``, or ``"dim=0, hstack"`` if the function is not ``torch.cat``."""
        return f"dim={self.dim}" + ("" if self.arrangement == "cat" else f", {self.arrangement}")


def _columns(x: Tensor) -> Tensor:
    """Return a vector (n,) as a matrix (n, 1) and a 0-d tensor as (1, 1); any other tensor as it is."""
    return x.reshape(-1, 1) if x.dim() < 2 else x


# What becomes of each tensor, and the axis where all of them have as many axes as that leaves at least.
_ARRANGED: Mapping[str, tuple[Callable[..., Tensor], int]] = {
    "hstack": (torch.atleast_1d, 1),
    "vstack": (torch.atleast_2d, 0),
    "dstack": (torch.atleast_3d, 2),
    "column_stack": (_columns, 1),
}


def _arranged(tensors: tuple[Tensor, ...], dim: int, arrangement: Arrangement) -> tuple[tuple[Tensor, ...], int]:
    """Return ``(tensors, axis)`` to concatenate: tensors are reshaped as ``stack``, ``hstack`` and the like do.

    ``arrangement`` names torch's function, and ``torch.cat`` of the result is what it returns. ``dim`` is the argument
    of "cat" and "stack"; the others have a fixed axis.
    """
    if arrangement == "cat":
        return tensors, dim
    if arrangement == "stack":
        return tuple(tensor.unsqueeze(dim) for tensor in tensors), dim
    arrange, axis = _ARRANGED[arrangement]
    made = tuple(map(arrange, tensors))
    return made, min(axis, made[0].dim() - 1)
