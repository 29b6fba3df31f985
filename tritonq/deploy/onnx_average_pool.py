"""Pools and means as ONNX operators that give the trained codes.

ONNX Runtime runs ``DequantizeLinear → GlobalAveragePool → QuantizeLinear`` as QLinearGlobalAveragePool, whose formula
is the one that was trained. Its other pools add floats in an order of their own, so the file adds whole numbers for
them: ``Round(N · mean(Round(x / s_in)))`` is the sum of the codes, which goes on by the same formula.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.deploy.modules import Quantizer
from tritonq.deploy.onnx_ops import global_average, round_half_away
from tritonq.deploy.onnx_quantizers import TracedQuantizer, grids_of
from tritonq.nn import AverageLayer
from tritonq.reference.average_pool import AdaptiveAverage, Averaging, AxesAverage, WindowAverage

# Sums of 8-bit codes over fewer elements stay below 2^22: a float32 mean, times their number, gives them back.
_MANY_TERMS = 2**14

_CODES = 255
_EXACT_FLOAT32 = 2**24
_POOLS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def rewrite_average(layer: AverageLayer, name: str, quantizer: nn.Module) -> None:
    """Make a layer trace to a sum of codes and one requantization, for ONNX Runtime.

    A mean over the whole image, of any size, becomes GlobalAveragePool where the output's type rounds ties to even. Of
    the other means these stay in float, since no ONNX operator adds their codes exactly; a warning (UserWarning) says
    so when the layer is traced:

    - pools with windows of 2^14 elements and more, but for those of the next line;
    - adaptive pools whose output sizes do not divide the input's, with a window of 65,794 elements and more;
    - where the file leaves height and width open (``dynamic_sizes``), pools whose windows have a number of elements
      that depends on them: adaptive pools, pools with ``ceil_mode``, and pools that leave padding out of the mean.

    Args:
        layer: a pool or mean whose input and output have one known grid each (:func:`grids_of` is not None); its
            forward, buffers and children are changed in place.
        name: the layer's name in the model, for the warning.
        quantizer: the traced form of its output quantizer, a :class:`TracedQuantizer` whose ``exact`` is False: its
            operator divides values by the scale, not steps.
    """
    source, output = cast(tuple[Quantizer, Quantizer], grids_of(layer))
    layer.register_buffer("input_scale", source.scale.reshape(()))
    layer.register_buffer("output_scale", output.scale.reshape(()))
    layer.activation_post_process = nn.Identity()
    layer.add_module("traced_quantizer", quantizer)
    layer.forward = partial(_forward, layer, name, output.qtype.rounding == "half_away")  # type: ignore[method-assign]


def rewrite_global_average(layer: AverageLayer) -> None:
    """Make a layer trace to its mean in float, which its own output quantizer rounds, if it has one.

    A mean over all axes behind the first two becomes GlobalAveragePool: TensorRT 8 does not read the axes of a
    ReduceMean of opset 18, which are an input, and reduces over all axes. An adaptive pool to size 1 is such a mean. So
    is a window as large as an image of fixed size, with neither padding nor ``divisor_override``. Any other mean is
    computed as torch does.

    Args:
        layer: any pool or mean, whether its grids are known or not; changed in place.
    """
    layer.set_quantizers(None)
    layer.compute = partial(_global_mean, layer.averaging)  # type: ignore[method-assign]


def _global_mean(averaging: Averaging, x: Tensor) -> Tensor:
    if not _is_global(averaging, x):
        return averaging.mean(x)
    y: Tensor = global_average(x)
    return y if not isinstance(averaging, AxesAverage) or averaging.keepdim else y.flatten(1)


def _forward(layer: Any, name: str, half_away: bool, input: Tensor) -> Tensor:
    averaging, quantizer = cast(Averaging, layer.averaging), cast(TracedQuantizer, layer.traced_quantizer)
    if not half_away and _is_global(averaging, input):
        y = quantizer(global_average(input))
        keeps = not isinstance(averaging, AxesAverage) or averaging.keepdim
        return y if keeps else y.flatten(1)
    sums = _sums(averaging, input, layer.input_scale)
    if sums is None:
        warnings.warn(
            f"{name}: its windows are too large, or their sizes depend on open axes of the input: the ONNX file "
            "computes this mean in float, and codes may differ by one where a mean lies between two of them",
            stacklevel=2,
        )
        return quantizer(averaging.mean(input))
    divisors: Any = averaging.divisors(tuple(input.shape))
    steps = sums.float() * (layer.input_scale / (layer.output_scale * divisors))
    return quantizer(round_half_away(steps) if half_away else steps, in_steps=True)


def _is_global(averaging: Averaging, x: Tensor) -> bool:
    """Whether a mean is over all axes behind batch and channels of ``x``."""
    spatial = tuple(range(2, x.dim()))
    if not spatial:
        return False
    if isinstance(averaging, AxesAverage):
        return averaging.axes is not None and tuple(sorted(axis % x.dim() for axis in averaging.axes)) == spatial
    if isinstance(averaging, AdaptiveAverage):
        return averaging.output_size == (1,) * len(spatial)
    if not isinstance(averaging, WindowAverage) or any(averaging.padding) or averaging.divisor_override is not None:
        return False
    return _is_static(x) and averaging.kernel_size == tuple(x.shape[2:])


def _sums(averaging: Averaging, x: Tensor, scale: Tensor) -> Tensor | None:
    """Return the sums of codes (minus zero points) that the means of values on a grid divide, whole numbers as floats.

    None if no ONNX operators give them exactly.

    Args:
        averaging: which elements each mean takes.
        x: values on the grid.
        scale: the grid's scale.
    """
    if isinstance(averaging, AxesAverage):
        return _sums_over_axes(averaging, x, scale)
    if not _is_static(x) and not _is_regular(averaging):
        return None
    if isinstance(averaging, AdaptiveAverage):
        if averaging.divides(tuple(x.shape)):
            sizes = x.shape[-len(averaging.output_size) :]
            outs = zip(sizes, averaging.output_size, strict=True)
            kernel = tuple(size if out == 1 else 1 if out is None else size // out for size, out in outs)
            averaging = WindowAverage(kernel, kernel, (0,) * len(kernel))
        else:
            return _sums_by_matrices(averaging, x, scale)
    return _sums_of_windows(cast(WindowAverage, averaging), x, scale)


def _sums_over_axes(averaging: AxesAverage, x: Tensor, scale: Tensor) -> Tensor:
    axes = tuple(range(x.dim())) if averaging.axes is None else averaging.axes
    codes = (x / scale).round()
    static = all(isinstance(x.shape[axis], int) for axis in axes)
    # A sum of whole numbers is exact in any order.
    large = not static or _CODES * math.prod(x.shape[axis] for axis in axes) >= _EXACT_FLOAT32
    return (codes.double() if large else codes).sum(axes, averaging.keepdim)


def _sums_of_windows(window: WindowAverage, x: Tensor, scale: Tensor) -> Tensor | None:
    elements = math.prod(window.kernel_size)
    if elements >= _MANY_TERMS:
        return None
    # OpenVINO computes a pool of dequantized values in its own integers, and pads with the code 0 whatever that means.
    values = (x / scale).round()
    rank = len(window.kernel_size)
    pads: list[int] = []
    for size, kernel, stride, before in zip(
        x.shape[-rank:], window.kernel_size, window.stride, window.padding, strict=True
    ):
        after = before
        if window.ceil_mode:
            last = (window.windows(size, kernel, stride, before) - 1) * stride + kernel
            after = max(last - size - before, 0)
        pads = [before, after, *pads]
    if any(pads):
        values = F.pad(values, pads)
    means: Tensor = _POOLS[rank](values, window.kernel_size, window.stride)
    return (means * elements).round()


def _sums_by_matrices(adaptive: AdaptiveAverage, x: Tensor, scale: Tensor) -> Tensor | None:
    if adaptive.terms(tuple(x.shape)) * _CODES >= _EXACT_FLOAT32:
        return None
    sums = (x / scale).round()
    first = x.dim() - len(adaptive.output_size)
    for axis, bounds in enumerate(adaptive.bounds(tuple(x.shape)), first):
        member = torch.zeros(x.shape[axis], len(bounds))
        for index, (start, end) in enumerate(bounds):
            member[start:end, index] = 1
        sums = (sums.movedim(axis, -1) @ member.to(x.device)).movedim(-1, axis)
    return sums


def _is_static(x: Tensor) -> bool:
    return all(isinstance(size, int) for size in x.shape[2:])


def _is_regular(averaging: Averaging) -> bool:
    """Whether all windows have the same number of elements, whatever the size of the input."""
    if not isinstance(averaging, WindowAverage) or averaging.ceil_mode:
        return False
    counts_all = averaging.count_include_pad or not any(averaging.padding)
    return counts_all or averaging.divisor_override is not None
