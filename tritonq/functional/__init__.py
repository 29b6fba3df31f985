"""Differentiable functions on tensors. Public functions check their arguments; code below them does not check again.

Words of these files, besides those of docs/glossary.md:

- A *grid* (:class:`tritonq.grid.Grid`) is scale, zero point, range of codes and a switch. A result "on the grid" is a
  float tensor of values ``(code - zero_point) · scale``; "before clipping", its codes may pass the ends of the range.
- *Statistics* (:class:`tritonq.grid.RangeStatistics`) are a running range; an operator that is given some updates them
  in place with what it rounds, and scale and zero point with them. None observes nothing.
- A *ceiling* is the upper bound of a ReLU: infinity for a plain ReLU, 6 for ReLU6, None without a ReLU.
- *fl* in formulas is rounding to float32.
- The *host* is Python. Reading a tensor of a GPU on the host waits for the device; a tensor is *readable*
  (`is_readable`) if it does not.
"""

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
