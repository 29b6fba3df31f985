"""Differentiable functions on tensors. Arguments are checked here and nowhere deeper."""

from tritonq.functional.fake_quant import (
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
)

__all__ = ["fake_quantize_per_channel_affine", "fake_quantize_per_tensor_affine"]
