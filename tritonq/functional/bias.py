"""Quantizing a bias to 32-bit integers; one step is the input's scale times the weight's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype
from tritonq.functional.integer import bias_steps
from tritonq.functional.validate import check_float_tensor
from tritonq.qparams import is_readable


def quantize_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Round a bias to the grid of the integer sums that it is added to; gradients pass straight through.

    ``s = fl(input_scale · weight_scale)``, ``y = clip(round(bias / s)) · s``: codes are clipped to ±(2^31 - 128), the
    largest number below 2^31 that float32 holds, and ties go to even. fl rounds to the dtype that torch gives the
    product of the scales, float32 for float32 scales. The quotient ``bias / s`` and the product of code and s are
    computed in float64. NaN stays NaN. The bias gets the gradient of the result, clipped or not; the scales get none.

    Args:
        bias: (out,) float tensor.
        input_scale: float tensor of one element.
        weight_scale: float tensor, (out,) or one element.

    Returns:
        (out,) in the dtype of ``bias``.

    Raises:
        TypeError: an argument is not a floating point tensor.
        ValueError: shapes do not fit, or a product of scales is not positive and finite (checked on CPU tensors); an
            underflow to zero counts.

    Source: docs/conv-bn.md, "Biases"; MegEngine.

    Examples:
        >>> quantize_bias(torch.tensor([0.26, -1.0]), torch.tensor(0.5), torch.tensor([0.2, 0.25]))
        tensor([ 0.3000, -1.0000])
    """
    for name, value in (("bias", bias), ("input_scale", input_scale), ("weight_scale", weight_scale)):
        check_float_tensor(name, value)
    if input_scale.numel() != 1:
        raise ValueError(f"input_scale must have one element, got shape {tuple(input_scale.shape)}")
    if weight_scale.numel() != 1 and weight_scale.shape != bias.shape:
        raise ValueError(f"weight_scale must have one element or {tuple(bias.shape)}, got {tuple(weight_scale.shape)}")
    scale = input_scale.reshape(()) * (weight_scale.reshape(()) if weight_scale.numel() == 1 else weight_scale)
    if is_readable(scale) and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"input_scale * weight_scale must be positive and finite, got {scale.flatten()[:8].tolist()}")
    result: Tensor = _QuantizeBias.apply(bias, scale)  # type: ignore[no-untyped-call]
    return result


class _QuantizeBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, scale: Tensor) -> Tensor:
        return as_dtype(bias_steps(bias, scale) * scale.double(), bias.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None
