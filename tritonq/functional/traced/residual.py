"""`tritonq.reference.residual` for ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.backend import implementation
from tritonq.functional.traced.text import own, pack, unpack
from tritonq.reference.quantizer_state import QuantizerState
from tritonq.reference.residual import Join
from tritonq.reference.residual import pack as mask_of


def forward(a: Tensor, b: Tensor, quantizer: QuantizerState | None, ceiling: float | None) -> Join:
    """See the reference."""
    return Join(*_forward(a, b, *pack(quantizer), ceiling))


def backward(dy: Tensor, mask: Tensor) -> Tensor:
    """See the reference."""
    return _backward(dy, mask)  # type: ignore[no-any-return]


@torch.library.custom_op("tritonq::residual_forward", mutates_args=("buffers",))
def _forward(
    a: Tensor, b: Tensor, buffers: list[Tensor], switches: list[Tensor], text: str, ceiling: float | None
) -> tuple[Tensor, Tensor]:
    y, mask = implementation("residual", a).forward(a, b, unpack(buffers, switches, text), ceiling)
    return y, mask


@_forward.register_fake
def _(
    a: Tensor, b: Tensor, buffers: list[Tensor], switches: list[Tensor], text: str, ceiling: float | None
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(a + b)
    return y, mask_of(y.new_empty(y.numel(), dtype=torch.float32))


@torch.library.custom_op("tritonq::residual_backward", mutates_args=())
def _backward(dy: Tensor, mask: Tensor) -> Tensor:
    return own(implementation("residual", dy).backward(dy, mask), dy, dy)


@_backward.register_fake
def _(dy: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(dy)
