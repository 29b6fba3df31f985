"""The training steps of a layer with BatchNorm: one function for each mode of folding.

To *fold* a BatchNorm is to multiply the weight by γ/σ. Each function takes the layer, its float input, and its weight W
and bias b (or None), neither folded nor rounded, and returns the layer's output: ReLU (if it has one) and fake
quantization of the output follow the formulas here. ``op`` is the convolution or product, FQ_w and FQ_b are fake
quantization of weight and bias (:func:`bias_on_grid`), BN is the BatchNorm, which normalises by the batch and updates
the running statistics. ``σ(v)`` is ``sqrt(v + eps)``; γ counts as 1, β and b as 0, where there are none. Most modes are
compositions of differentiable operators. The approximate mode has an operator of its own,
`tritonq.functional.conv_bn`; its composition here serves quantizers that the operator can't take over.
Formulas: docs/conv-bn.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from tritonq.fake_quantize import FakeQuantize
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.bias import quantize_bias
from tritonq.functional.channel_moments import channel_moments
from tritonq.functional.conv2d import find_kernel
from tritonq.functional.conv_bn import ConvBnStep, conv_bn
from tritonq.functional.dispatch import implementation
from tritonq.functional.integer import raise_scale_for_bias
from tritonq.functional.recomputation import is_recomputing, normalize_once
from tritonq.nn.batch_norm import batch_norm_state, gamma_signs, is_plain
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.nn.eval_mode import PATHS as EVAL_PATHS
from tritonq.nn.fusable import observed_grid, warn_if_unobserved
from tritonq.nn.paths import Path
from tritonq.nn.qat import QATLayer
from tritonq.reference.conv_bn import update_running_statistics
from tritonq.reference.fold import fold_scale, scale_out_channels

_BITS = 8


def one_operator(layer: QATBatchNormLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the approximate mode, ``BN(op(x, FQ_w(W s)) / s + b)`` with ``s = γ/σ(running_var)``, in one operator.

    ``running_var`` is that from before the step's update; s is ``1/σ`` where ``|γ/σ| < 1e-12``. The operator
    computes ReLU, too, and the output's quantization if it can observe and round in the quantizer's place
    (:func:`observed_grid`) and the grid is per tensor; else the quantizer follows.
    """
    layer.check_input(x)
    x, op = layer.linear_map.padded(x)
    output = observed_grid(layer.activation_post_process)
    if output is not None and output[0].qtype.axis is not None:
        output = None
    weight_grid, weight_statistics = observed_grid(layer.weight_fake_quant) or (None, None)
    output_grid, output_statistics = output or (None, None)
    step = ConvBnStep(
        op,
        batch_norm_state(layer.bn),
        weight_grid,
        weight_statistics,
        output_grid,
        output_statistics,
        layer.saved_input_grid(),
        layer.ceiling,
        layer.step_memory,
    )
    y = conv_bn(x, weight, bias, layer.bn.weight, layer.bn.bias, step)
    if output is None:
        return cast(Tensor, layer.activation_post_process(y))
    warn_if_unobserved(layer.activation_post_process)
    return y


def approximate(layer: QATBatchNormLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the approximate mode by several operators: ``BN(op(x, FQ_w(W s)) / s + b)``.

    ``s = γ/σ(running_var)``, and ``1/σ`` in channels where γ is 0; ``running_var`` is that from before the step's
    update.
    """
    running_var, bn = _running_var_of_step(layer), layer.bn
    scale = fold_scale(running_var, bn.weight, bn.eps)
    if bn.weight is not None:
        # In a channel with γ = 0 the weight is quantized as if γ were 1; BatchNorm still multiplies by 0.
        scale = torch.where(bn.weight == 0, torch.rsqrt(running_var + bn.eps), scale)
    folded, grid = layer.weight_to_map(scale_out_channels(weight, scale, *layer.grouping))
    y = layer.mapped(x, folded, weight_grid=grid)
    y = y / layer.along_channels(scale, y)
    y = normalize_once(bn, y if bias is None else y + layer.along_channels(bias, y))
    return layer.quantized_output(y)


def exact(layer: QATBatchNormLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Fold the batch's own statistics: ``op(x, FQ_w(W t)) + FQ_b(β - t · mean)`` with ``t = γ/σ(var)``.

    FQ_b rounds the bias to multiples of input scale × weight scale, as :func:`bias_on_grid` has it; ReLU and the
    output's quantizer follow. Mean and biased variance are those of ``op(x, W)``, and gradients flow through them: the
    layer runs twice. They also update the running statistics: the running mean by the mean plus b, the running variance
    by the unbiased variance. Otherwise b has no effect, and its gradient is zero. The second time one kernel computes
    the layer with its rounded bias and ReLU, if the kernel is faster.

    Raises:
        ValueError: fewer than two values per channel, or a BatchNorm of another class than torch's, with hooks, or
            synchronized over ranks.
    """
    mean, inverse_std = _batch_statistics(layer, x, weight, bias)
    scale = inverse_std if layer.bn.weight is None else layer.bn.weight * inverse_std
    rounded = layer.quantized_weight(scale_out_channels(weight, scale, *layer.grouping))
    on_grid = bias_on_grid(layer, _batch_bias(layer, bias, mean, scale))
    kernel = find_kernel(x, rounded, layer.linear_map)
    if kernel is not None:
        return cast(Tensor, layer.activation_post_process(kernel(x, rounded, on_grid, layer.ceiling)))
    y = layer.mapped(x, rounded)
    return layer.quantized_output(y + layer.along_channels(on_grid, y))


def corrected(layer: QATBatchNormLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Fold the updated running variance rv, then rescale to the batch's: ``op(x, FQ_w(W t)) σ(rv)/σ(var) + shift``.

    ``t = γ/σ(rv)`` and ``shift = β - γ/σ(var) · mean``, not rounded. Mean and biased variance var are those of ``op(x,
    W)``. The running statistics, rv among them, are updated first. Gradients flow through mean and var: the layer runs
    twice. The bias b counts only in the running mean, and gets a gradient of zero.

    Raises:
        ValueError: as for :func:`exact`: fewer than two values per channel, or a BatchNorm that is not plain.
    """
    mean, inverse_std = _batch_statistics(layer, x, weight, bias)
    running_var, bn = _running_var(layer), layer.bn
    fold = fold_scale(running_var, bn.weight, bn.eps)
    folded, grid = layer.weight_to_map(scale_out_channels(weight, fold, *layer.grouping))
    y = layer.mapped(x, folded, weight_grid=grid)
    y = y * layer.along_channels(torch.sqrt(running_var + bn.eps) * inverse_std, y)
    scale = inverse_std if bn.weight is None else bn.weight * inverse_std
    return layer.quantized_output(y + layer.along_channels(_batch_bias(layer, bias, mean, scale), y))


def frozen(layer: QATBatchNormLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Fold the running statistics, which stay as they are: ``op(x, FQ_w(W t)) + FQ_b(β + t (b - running_mean))``.

    FQ_b rounds the bias to multiples of input scale × weight scale, as :func:`bias_on_grid` has it; ReLU and the
    output's quantizer follow. ``t = γ/σ(running_var)``; in mode "scale" the weight is ``|t| FQ_w(u W)`` with ``u = -1``
    where γ < 0, else 1. One kernel computes it with its ReLU, if the kernel is faster. Layers of any mode train so
    while their BatchNorm is frozen.
    """
    folded, folded_bias = layer.folded_parameters(weight, bias)
    kernel = find_kernel(x, folded, layer.linear_map)
    if layer.mode == "scale":
        folded, grid = scaled_weight(layer, weight), None
    else:
        folded, grid = (layer.quantized_weight(folded), None) if kernel else layer.weight_to_map(folded)
    # Behind the weight's quantizer, whose scale is the bias's too.
    on_grid = bias_on_grid(layer, folded_bias)
    if kernel is None:
        return layer.quantized_output(layer.mapped(x, folded, on_grid, grid))
    return cast(Tensor, layer.activation_post_process(kernel(x, folded, on_grid, layer.ceiling)))


def in_scale(layer: QATBatchNormLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the mode "scale": ``BN(op(x, u FQ_w(u W)) + b)`` with ``u = -1`` where γ < 0, else 1.

    The weight's codes depend on no statistics.
    """
    signs = gamma_signs(layer.bn)
    rounded = layer.quantized_weight(scale_out_channels(weight, signs, *layer.grouping))
    y = layer.mapped(x, scale_out_channels(rounded, signs, *layer.grouping), bias)
    return layer.quantized_output(normalize_once(layer.bn, y))


def scaled_weight(layer: QATBatchNormLayer, weight: Tensor) -> Tensor:
    """Return ``|t| FQ_w(u W)``, the rounded folded weight in mode "scale".

    ``t = γ/σ(running_var)``, and ``u`` is -1 where γ < 0, else 1.
    """
    rounded = layer.quantized_weight(scale_out_channels(weight, gamma_signs(layer.bn), *layer.grouping))
    scale = fold_scale(_running_var(layer), layer.bn.weight, layer.bn.eps)
    return scale_out_channels(rounded, scale.abs(), *layer.grouping)


# What a layer with a BatchNorm runs on each path.
PATHS: dict[Path, Callable[..., Tensor]] = {
    **EVAL_PATHS,
    "train_frozen": frozen,
    "train_operator": one_operator,
    "train_approximate": approximate,
    "train_exact": exact,
    "train_corrected": corrected,
    "train_scale": in_scale,
}


def bias_on_grid(layer: QATLayer, bias: Tensor) -> Tensor:
    """Return ``bias``, (out channels,), rounded to multiples of input scale × weight scale, in its dtype.

    Its values stay unless input and weight have known symmetric 8-bit grids that are switched on and rest on data. The
    gradient passes straight through. Where the weight scale is so small that the bias would exceed 32-bit codes, as in
    dead channels, the smallest scale that fits takes its place.
    """
    # The input's quantizer first: a trained width of the weight is read from the device.
    if layer.input_quantizer is None or not _is_symmetric_int8(layer.input_quantizer):
        return bias
    quantizers = layer.integer_quantizers()
    if quantizers is None or not _is_symmetric_int8(quantizers[1]):
        return bias
    source, quantizer = quantizers
    both_on = (source.enabled_on_device() & quantizer.enabled_on_device()) != 0
    input_scale, weight_scale = source.calculate_qparams().scale, layer.weight_grid().scale
    weight_scale = raise_scale_for_bias(weight_scale.expand(len(bias)), bias, input_scale)
    rounded = quantize_bias(bias, input_scale, weight_scale)
    return torch.where(both_on, rounded, bias)


def _is_symmetric_int8(quantizer: FakeQuantizeBase) -> bool:
    """Whether a quantizer to integers has a symmetric 8-bit grid, with zero points of 0."""
    if isinstance(quantizer, FakeQuantize) and not quantizer.activation_post_process.zero_point_is_zero:
        return False
    return quantizer.qtype.bits == _BITS and quantizer.qtype.fixed_zero_point == 0


def _batch_statistics(
    layer: QATBatchNormLayer, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return mean and ``1/σ`` of ``op(x, W)`` per channel, differentiable; update the running statistics.

    ``σ = sqrt(variance + eps)`` with the biased variance. The bias counts only in the running mean.

    Raises:
        ValueError: a BatchNorm of another class than torch's, with hooks, or synchronized over ranks; or an input
            without a batch.
    """
    if not is_plain(layer.bn):
        raise ValueError(f"this mode of folding needs a plain BatchNorm, got {type(layer.bn).__name__}")
    layer.check_input(x)
    c = layer.mapped(x, weight)
    mean, var = channel_moments(c)
    with torch.no_grad():
        batch_mean = mean if bias is None else mean + bias
        update_running_statistics(batch_norm_state(layer.bn), batch_mean, var, c.numel() // c.shape[1])
    return mean, torch.rsqrt(var + layer.bn.eps)


def _batch_bias(layer: QATBatchNormLayer, bias: Tensor | None, mean: Tensor, scale: Tensor) -> Tensor:
    """Return ``β + scale (b - (mean + b))``: the convolution's bias b cancels, and gets a gradient of zero.

    β and b are 0 where there are none; ``mean`` is that of ``op(x, W)``; all are (out channels,).
    """
    shift = -scale * mean if layer.bn.bias is None else layer.bn.bias - scale * mean
    return shift if bias is None else shift + (bias - bias)


def _running_var_of_step(layer: QATBatchNormLayer) -> Tensor:
    """Return the running variance from before this step's update; a recomputed step gets the same one again."""
    memory = layer.step_memory
    if is_recomputing() and memory.running_var is not None:
        return memory.running_var
    if torch.compiler.is_compiling():
        running_var = _running_var(layer)
        copy: Tensor = implementation("fold", running_var).remembered(running_var)
        return copy
    memory.running_var = _running_var(layer).clone()
    return memory.running_var


def _running_var(layer: QATBatchNormLayer) -> Tensor:
    """Return the running variance of a layer's BatchNorm."""
    return cast(Tensor, layer.bn.running_var)
