"""`tritonq.reference.fake_quant` for ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.backend import implementation
from tritonq.functional.traced.text import own, qtype_of, qtype_text
from tritonq.qparams import QuantizedType, Rounding


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    rounding: Rounding = "half_even",
    *,
    active: Tensor | None = None,
) -> Tensor:
    """See the reference."""
    grid = qtype_text(QuantizedType(quant_min, quant_max, False, axis, rounding))
    return _fake_quantize(x, scale, zero_point, active, grid)  # type: ignore[no-any-return]


def fake_quantize_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    rounding: Rounding = "half_even",
    *,
    active: Tensor | None = None,
) -> Tensor:
    """See the reference."""
    grid = qtype_text(QuantizedType(quant_min, quant_max, False, axis, rounding))
    return _fake_quantize_backward(dy, x, scale, zero_point, active, grid)  # type: ignore[no-any-return]


@torch.library.custom_op("tritonq::fake_quantize", mutates_args=())
def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, active: Tensor | None, grid: str) -> Tensor:
    qtype, ops = qtype_of(grid), implementation("fake_quant", x)
    codes = (qtype.quant_min, qtype.quant_max, qtype.axis, qtype.rounding)
    return own(ops.fake_quantize(x, scale, zero_point, *codes, active=active), x, x)


@_fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, active: Tensor | None, grid: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tritonq::fake_quantize_backward", mutates_args=())
def _fake_quantize_backward(
    dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, active: Tensor | None, grid: str
) -> Tensor:
    qtype, ops = qtype_of(grid), implementation("fake_quant", x)
    codes = (qtype.quant_min, qtype.quant_max, qtype.axis, qtype.rounding)
    return own(ops.fake_quantize_backward(dy, x, scale, zero_point, *codes, active=active), x, dy, x)


@_fake_quantize_backward.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, active: Tensor | None, grid: str) -> Tensor:
    return torch.empty_like(x)
