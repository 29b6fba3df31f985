"""Differentiable functions on tensors. Arguments are checked here and nowhere deeper."""

from tritonq.functional.bias import quantize_bias
from tritonq.functional.fake_quant import fake_quantize_per_channel_affine, fake_quantize_per_tensor_affine
from tritonq.functional.fixed_point import fixed_point_quantize, search_frac_len, statistic_frac_len
from tritonq.functional.float_blocks import fake_quantize_float
from tritonq.functional.fold import FoldedConv, fold_conv_bn, fuse_conv_bn
from tritonq.functional.histogram import histogram
from tritonq.functional.learned_scale import clipped_quantize, fake_quantize_learnable, trained_threshold_quantize

__all__ = [
    "FoldedConv",
    "clipped_quantize",
    "fake_quantize_float",
    "fake_quantize_learnable",
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "fixed_point_quantize",
    "fold_conv_bn",
    "fuse_conv_bn",
    "histogram",
    "quantize_bias",
    "search_frac_len",
    "statistic_frac_len",
    "trained_threshold_quantize",
]
