"""Fake quantization to floats of few bits (FP8, MXFP4, NVFP4 and the like) as a differentiable function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tritonq.backend import Backend
from tritonq.formats import BLOCK_FORMATS, ELEMENT_FORMATS, FLOAT_FORMATS, BlockFormat, ScaleRounding
from tritonq.functional.differentiable_once import differentiable_once
from tritonq.functional.dispatch import implementation
from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.validate import check_axis, check_float_tensor, check_scale
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType


def fake_quantize_float(
    x: Tensor,
    format: str,
    scale: float | Tensor | None = None,
    *,
    axis: int | None = None,
    scale_rounding: ScaleRounding = "floor",
    backend: Backend = "auto",
) -> Tensor:
    """Round ``x`` to a floating point format of few bits, in saturating mode; gradients pass straight through.

    ``y = round(x/s) * s``, to the nearest number of the format, ties to even.

    - ``"fp8_e4m3"``, ``"fp8_e5m2"``, ``"fp6_e2m3"``, ``"fp6_e3m2"``, ``"fp4_e2m1"``: ``s`` is ``scale``. The gradient
      is ``dy`` where ``x/s`` rounds to a finite number of the format, 0 where it saturates and at NaN.
    - ``"mxfp8"`` (also ``"mxfp8_e4m3"``), ``"mxfp8_e5m2"``, ``"mxfp6_e2m3"``, ``"mxfp6_e3m2"``, ``"mxfp4"``: each 32
      elements along ``axis`` share an ``s``, a power of two found from their largest magnitude.
    - ``"nvfp4"``: each 16 elements along ``axis`` share an E4M3 number; ``s`` is this number times the tensor's float32
      ``scale``, by default its largest finite magnitude over 6 · 448 (1 if that is 0).

    In block formats (the last two items) the gradient is ``dy`` everywhere, and nothing is saved for it; the last block
    of an axis may be shorter. NaN stays NaN, and makes its whole block NaN. Infinities saturate; in the largest
    magnitude of a block they count as the largest float32.

    Args:
        x: any shape and strides; float32, float16, bfloat16 or float64.
        format: one of those above.
        scale: a number or a float tensor on ``x``'s device: one element without ``axis``, else (x.shape[axis],); None:
            1. Of ``"nvfp4"`` one element, None as above. Block formats with powers of two take none. Values of CUDA
            tensors are not checked.
        axis: the axis that the elements of ``scale`` lie along (None: one scale); of block formats the axis that the
            blocks lie along (None: the last). May be negative.
        scale_rounding: of powers of two. ``"floor"`` as the OCP specification has it: the block's largest elements may
            saturate. ``"ceil"``: no element saturates.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.

    Returns:
        Tensor of ``x``'s shape, dtype and memory format. The arithmetic is float32 (float64 for float64 input).

    Raises:
        TypeError: ``x`` is no float tensor, scale neither a number nor a float tensor, or ``axis`` no int.
        ValueError: an unknown format or rounding, ``"ceil"`` for a format without scales that are powers of two, an
            axis out of range, or a scale that the format does not take, that is not positive and finite, requires a
            gradient, or has another shape or device.
        RuntimeError: ``backend="triton"`` where no kernel can run.

    Source: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats (MX) Specification 1.0; NVIDIA
    Transformer Engine (NVFP4); Mishra et al., Recipes for Pre-training LLMs with MXFP8, 2025 (``"ceil"``).

    Examples:
        >>> x = torch.tensor([0.1, 0.7, 3.0, -5.1])
        >>> fake_quantize_float(x, "mxfp4")
        tensor([ 0.0000,  0.5000,  3.0000, -6.0000])
        >>> fake_quantize_float(x, "fp8_e4m3", 0.01)
        tensor([ 0.1000,  0.7200,  2.8800, -4.4800])
    """
    check_float_tensor("x", x)
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ValueError("scales of float formats are not trained: pass scale.detach()")
    if format in ELEMENT_FORMATS:
        if scale_rounding != "floor":
            raise ValueError(f"scale_rounding is of block formats with powers of two as scales, got {format!r}")
        qtype = QuantizedType.of_floats(ELEMENT_FORMATS[format], None if axis is None else check_axis(x, axis))
        channels = None if qtype.axis is None else x.shape[qtype.axis]
        return fake_quantize(x, Grid(check_scale(1.0 if scale is None else scale, x, channels), None, qtype), backend)
    if format not in BLOCK_FORMATS:
        raise ValueError(f"unknown format {format!r}; known: {', '.join((*ELEMENT_FORMATS, *BLOCK_FORMATS))}")
    blocks = replace(BLOCK_FORMATS[format], scale_rounding=scale_rounding)
    block_axis = check_axis(x, -1 if axis is None else axis)
    if scale is not None and blocks.scale == "e8m0":
        raise ValueError(f"{format} finds its scales from the blocks, got scale={scale!r}")
    return fake_quantize_blocks(x, blocks, block_axis, None if scale is None else check_scale(scale, x, None), backend)


def fake_quantize_blocks(
    x: Tensor,
    blocks: BlockFormat,
    axis: int,
    tensor_scale: Tensor | None = None,
    backend: Backend = "auto",
    enabled: Tensor | None = None,
) -> Tensor:
    """Round ``x`` to a block format: what :func:`fake_quantize_float` and the modules call; differentiable.

    ``y = round(x / s) * s``, to the nearest element, ties to even, saturating, with one scale s per block. With m the
    block's largest magnitude and ``L = 2^E · f``, ``1 <= f < 2``, the largest element:

    - e8m0 scales: ``s = 2^e``, ``e = floor(log2 m) - E``, clamped to ``-127 .. 127 - E``; with
      ``blocks.scale_rounding="ceil"`` e is one more where ``m > L · 2^e``.
    - e4m3 scales: ``s = e4m3(m / (L · t)) · t`` with the tensor's scale t.

    If the axis is no multiple of the block size, its last block is shorter. A block of zeros stays 0, and one with NaN
    becomes NaN; infinities count as the largest float32. The gradient is ``dy`` everywhere. Nothing is checked.

    Args:
        x: any shape; float16, bfloat16, float32 or float64.
        blocks: the format of elements and scales, and the block size.
        axis: the axis that blocks run along; not negative.
        tensor_scale: t, float32 of one element on ``x``'s device; None: that of :func:`float_tensor_scale` if block
            scales are e4m3. With block scales in e8m0 it must be None.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.
        enabled: the switch, bool or uint8 of one element on ``x``'s device; 0 lets values pass unchanged. None: on.

    Returns:
        Tensor of ``x``'s shape and dtype.
    """
    if blocks.scale == "e4m3" and tensor_scale is None:
        tensor_scale = float_tensor_scale(x.detach(), blocks, backend)
    if not (x.requires_grad and torch.is_grad_enabled()):
        ops = implementation("float_blocks", x, backend)
        y: Tensor = ops.fake_quantize_blocks(x, blocks, axis, tensor_scale, enabled)
        return y
    result: Tensor = _FakeQuantizeBlocks.apply(  # type: ignore[no-untyped-call]
        x, blocks, axis, tensor_scale, enabled, backend
    )
    return result


def float_tensor_scale(x: Tensor, blocks: BlockFormat, backend: Backend = "auto") -> Tensor:
    """Return the scale of a whole tensor, ``m / (L · 448)``, with m the largest magnitude of ``x``.

    L is the largest element of the format, and 448 the largest e4m3 number: the scale of the block with m is then
    448 times the result, ``m / L``, so that m becomes the element L.

    Args:
        x: any shape and float dtype; values that are not finite don't count. The scale is 1 if it would be 0, or if no
            value is finite.
        blocks: a format with e4m3 scales.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.

    Returns:
        0-d float32 tensor on ``x``'s device.

    Source: NVIDIA Transformer Engine, NVFP4.
    """
    low, high, _ = implementation("min_max", x, backend).min_max(x)
    largest = torch.maximum(-low, high)
    scale = largest / (blocks.element_format.largest * FLOAT_FORMATS["e4m3"].largest)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


class _FakeQuantizeBlocks(torch.autograd.Function):
    """The autograd function. It saves nothing: the gradient is the incoming one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        blocks: BlockFormat,
        axis: int,
        tensor_scale: Tensor | None,
        enabled: Tensor | None,
        backend: Backend,
    ) -> Tensor:
        ops = implementation("float_blocks", x, backend)
        y: Tensor = ops.fake_quantize_blocks(x, blocks, axis, tensor_scale, enabled)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None, None, None, None, None
