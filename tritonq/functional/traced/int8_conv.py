"""`tritonq.reference.int8_conv` for ``torch.compile``."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tritonq.backend import implementation
from tritonq.functional.traced.text import laid_out_as, own


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    quant_min: int,
    quant_max: int,
    out_dtype: torch.dtype,
    saturated: Tensor | None = None,
) -> Tensor:
    """See the reference. On a CPU each call in which accumulators were clamped warns."""
    counts = [] if saturated is None else [saturated]
    geometry = (list(stride), list(padding), list(dilation), groups)
    return _int8_conv2d(x, weight, bias, shift, *geometry, quant_min, quant_max, out_dtype, counts)  # type: ignore[no-any-return]


@torch.library.custom_op("tritonq::int8_conv2d", mutates_args=("saturated",))
def _int8_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    quant_min: int,
    quant_max: int,
    out_dtype: torch.dtype,
    saturated: list[Tensor],
) -> Tensor:
    sizes = ((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)
    count = saturated[0] if saturated else None
    before = int(count) if count is not None and count.is_cpu else 0
    ops = implementation("int8_conv", x)
    y = ops.int8_conv2d(x, weight, bias, shift, *sizes, quant_min, quant_max, out_dtype, count)
    if count is not None and count.is_cpu and int(count) > before:
        warnings.warn(
            f"{int(count) - before} accumulators of a compiled fixed-point network passed 32 bits and were clamped to"
            " ±(2^31 - 1); tritonq.deploy.fixed_point_modules.overflow_report counts them by layer",
            RuntimeWarning,
            stacklevel=2,
        )
    return own(y, laid_out_as(x, y.shape), x)


@_int8_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    quant_min: int,
    quant_max: int,
    out_dtype: torch.dtype,
    saturated: list[Tensor],
) -> Tensor:
    images, _, *image = x.shape
    outs, _, *kernel = weight.shape
    sizes = [
        (size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i, size in enumerate(image)
    ]
    return laid_out_as(x, (images, outs, *sizes)).to(out_dtype)
