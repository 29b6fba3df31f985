"""`tritonq.reference.fixed_point` for ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.backend import implementation
from tritonq.functional.traced.text import own


def fixed_point_quantize(
    x: Tensor,
    frac_len: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    *,
    active: Tensor | None = None,
) -> Tensor:
    """See the reference."""
    return _fixed_point_quantize(x, frac_len, active, quant_min, quant_max, axis)  # type: ignore[no-any-return]


def fixed_point_quantize_backward(
    dy: Tensor,
    x: Tensor,
    frac_len: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    *,
    active: Tensor | None = None,
) -> Tensor:
    """See the reference."""
    grid = (quant_min, quant_max, axis)
    return _fixed_point_quantize_backward(dy, x, frac_len, active, *grid)  # type: ignore[no-any-return]


def search_frac_len(x: Tensor, quant_min: int, quant_max: int, candidates: int, axis: int | None = None) -> Tensor:
    """See the reference."""
    return _search_frac_len(x, quant_min, quant_max, candidates, axis)  # type: ignore[no-any-return]


@torch.library.custom_op("tritonq::fixed_point_quantize", mutates_args=())
def _fixed_point_quantize(
    x: Tensor, frac_len: Tensor, active: Tensor | None, quant_min: int, quant_max: int, axis: int | None
) -> Tensor:
    ops = implementation("fixed_point", x)
    return own(ops.fixed_point_quantize(x, frac_len, quant_min, quant_max, axis, active=active), x, x)


@_fixed_point_quantize.register_fake
def _(x: Tensor, frac_len: Tensor, active: Tensor | None, quant_min: int, quant_max: int, axis: int | None) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tritonq::fixed_point_quantize_backward", mutates_args=())
def _fixed_point_quantize_backward(
    dy: Tensor, x: Tensor, frac_len: Tensor, active: Tensor | None, quant_min: int, quant_max: int, axis: int | None
) -> Tensor:
    grid = (quant_min, quant_max, axis)
    dx = implementation("fixed_point", x).fixed_point_quantize_backward(dy, x, frac_len, *grid, active=active)
    return own(dx, x, dy, x)


@_fixed_point_quantize_backward.register_fake
def _(
    dy: Tensor, x: Tensor, frac_len: Tensor, active: Tensor | None, quant_min: int, quant_max: int, axis: int | None
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tritonq::search_frac_len", mutates_args=())
def _search_frac_len(x: Tensor, quant_min: int, quant_max: int, candidates: int, axis: int | None) -> Tensor:
    found: Tensor = implementation("fixed_point", x).search_frac_len(x, quant_min, quant_max, candidates, axis)
    return found.contiguous()


@_search_frac_len.register_fake
def _(x: Tensor, quant_min: int, quant_max: int, candidates: int, axis: int | None) -> Tensor:
    return x.new_empty(() if axis is None else (x.shape[axis],), dtype=torch.int32)
