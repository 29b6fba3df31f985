"""Functions that the code of an accelerated graph calls in place of the library's nodes: layers, sums and quantizers.

Their arguments are tensors and fake quantizers of the library. FQ is the fake quantization by a quantizer; ``relu?`` a
ReLU with the given ``ceiling`` (infinity for a plain one, 6.0 for ReLU6), or none for None.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tritonq.acceleration.library_layers import BatchNorm, Layer, add, affine, normalized
from tritonq.acceleration.quantizers import quantize, quantize_rectified
from tritonq.functional.linear_map import Convolution, LinearMap, MatrixProduct
from tritonq.functional.recomputation import step_memory_of


def convolution(stride: Any, padding: Any, dilation: Any, groups: int, dimensions: int) -> LinearMap:
    """Return the convolution, not transposed, of aten's ``conv1d``, ``conv2d`` or ``conv3d`` with these arguments.

    Args:
        stride: one number for all dimensions, or one for each.
        padding: zeros on each side, one number for all dimensions, or one for each.
        dilation: distance of taps, one number for all dimensions, or one for each.
        groups: number of groups.
        dimensions: number of spatial axes: 1, 2 or 3.
    """
    listed = ([value] if isinstance(value, int) else list(value) for value in (stride, padding, dilation))
    strides, paddings, dilations = (tuple(value) * (dimensions if len(value) == 1 else 1) for value in listed)
    return Convolution(strides, paddings, dilations, (0,) * dimensions, False, groups)


def graph_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_quantizer: nn.Module,
    output_quantizer: nn.Module | None,
    ceiling: float | None,
    geometry: tuple[Any, ...] | None,
) -> Tensor:
    """Return ``FQ(relu?(op(x, FQ(weight)) + bias))``; the result is not rounded if ``output_quantizer`` is None.

    Quantizers that observe update their ranges in place. The result has the dtype of ``x``.

    Args:
        x: the input, (batch, in, ...) of a convolution, (..., in) of a matrix product.
        weight: the float weight, (out, in/groups, ...) or (out, in).
        bias: (out,) or None.
        weight_quantizer: fake quantizer of the weight.
        output_quantizer: fake quantizer of the result; None: it is not rounded.
        ceiling: that of the ReLU, infinity for a plain one; None: there is none.
        geometry: stride, padding, dilation, groups and dimensions, as :func:`convolution` takes them; None: ``op`` is a
            matrix product.
    """
    return affine(_layer(weight_quantizer, output_quantizer, ceiling, geometry), x, weight, bias)


def graph_conv_bn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, Tensor, Tensor, Tensor, float, float, bool],
    weight_quantizer: nn.Module,
    output_quantizer: nn.Module | None,
    ceiling: float | None,
    geometry: tuple[Any, ...],
) -> Tensor:
    """Return ``FQ(relu?(BN(conv(x, FQ(W s)) / s + b)))`` with ``s = γ/sqrt(running_var + eps)``.

    W is ``weight`` in float, not folded; b is ``bias``, (out,), 0 for None. ``norm`` holds γ, β, running mean, running
    variance, momentum, eps, and whether the BatchNorm trains: then it normalizes by its batch, and updates the running
    statistics in place. ``geometry`` holds stride, padding, dilation, groups and dimensions, as :func:`convolution`
    takes them. The result is not rounded if ``output_quantizer`` is None. Quantizers that observe update their ranges
    in place. A channel with γ = 0 takes ``1/sqrt(running_var + eps)`` for s while the BatchNorm trains; in eval mode
    BN gives β there.
    """
    layer = _layer(weight_quantizer, output_quantizer, ceiling, geometry)
    return normalized(layer, x, weight, bias, BatchNorm(*norm))


def graph_add(a: Tensor | float, b: Tensor | float, quantizer: nn.Module | None, ceiling: float | None) -> Tensor:
    """Return ``FQ(relu?(a + b))``; without FQ if ``quantizer`` is None, without ReLU if ``ceiling`` is None.

    One of ``a`` and ``b`` may be a number. A quantizer that observes updates its range in place.
    """
    return add(a, b, quantizer, ceiling)


def graph_quantize(x: Tensor, quantizer: nn.Module, ceiling: float | None) -> Tensor:
    """Return ``FQ(relu?(x))``, without ReLU if ``ceiling`` is None; a quantizer that observes updates its range."""
    return quantize(quantizer, x) if ceiling is None else quantize_rectified(quantizer, x, ceiling)


def _layer(
    weight_quantizer: nn.Module,
    output_quantizer: nn.Module | None,
    ceiling: float | None,
    geometry: tuple[Any, ...] | None,
) -> Layer:
    op = MatrixProduct() if geometry is None else convolution(*geometry)
    # A weight's quantizer belongs to one layer, which remembers there what a recomputation of its step needs.
    memory = step_memory_of(weight_quantizer)
    return Layer(op, weight_quantizer, output_quantizer, ceiling, memory=memory)
