"""`tritonq.reference.learned_scale` for ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.backend import implementation
from tritonq.functional.traced.text import own
from tritonq.reference.learned_scale import LearnedScale


def learned_fake_quantize(
    x: Tensor,
    parameter: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    method: LearnedScale,
    *,
    active: Tensor | None = None,
) -> Tensor:
    """See the reference."""
    grid = (quant_min, quant_max, axis, method)
    return _learned_fake_quantize(x, parameter, zero_point, active, *grid)  # type: ignore[no-any-return]


def learned_fake_quantize_backward(
    dy: Tensor,
    x: Tensor,
    parameter: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    method: LearnedScale,
    *,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference."""
    grid = (quant_min, quant_max, axis, method)
    dx, dparameter, dzero = _learned_fake_quantize_backward(dy, x, parameter, zero_point, active, *grid)
    return dx, dparameter, dzero


@torch.library.custom_op("tritonq::learned_fake_quantize", mutates_args=())
def _learned_fake_quantize(
    x: Tensor,
    parameter: Tensor,
    zero_point: Tensor | None,
    active: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    method: str,
) -> Tensor:
    grid = (quant_min, quant_max, axis, method)
    y = implementation("learned_scale", x).learned_fake_quantize(x, parameter, zero_point, *grid, active=active)
    return own(y, x, x)


@_learned_fake_quantize.register_fake
def _(
    x: Tensor,
    parameter: Tensor,
    zero_point: Tensor | None,
    active: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    method: str,
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tritonq::learned_fake_quantize_backward", mutates_args=())
def _learned_fake_quantize_backward(
    dy: Tensor,
    x: Tensor,
    parameter: Tensor,
    zero_point: Tensor | None,
    active: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grid = (quant_min, quant_max, axis, method)
    dx, dparameter, dzero = implementation("learned_scale", x).learned_fake_quantize_backward(
        dy, x, parameter, zero_point, *grid, active=active
    )
    return own(dx, x, dy, x), own(dparameter, parameter), own(dzero, parameter, dparameter)


@_learned_fake_quantize_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    parameter: Tensor,
    zero_point: Tensor | None,
    active: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(parameter), torch.empty_like(parameter)
