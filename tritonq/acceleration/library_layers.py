"""Layers of other libraries by tritonq's operators, as functions of tensors and of the library's fake quantizers.

FQ is the fake quantization by a quantizer of the library, ``relu?`` a ReLU if the layer has one, BN a BatchNorm, W and
b are weight and bias, ``op`` is the convolution or product. To *fold* is to multiply a weight by its BatchNorm's γ/σ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.acceleration.quantizers import (
    State,
    can_compute,
    formula_of,
    marked,
    quantize,
    quantize_rectified,
    state,
)
from tritonq.functional.channel_moments import channel_moments
from tritonq.functional.conv_bn import ConvBnStep, conv_bn
from tritonq.functional.linear_map import LinearMap
from tritonq.functional.marks import source_of
from tritonq.functional.recomputation import StepMemory, is_recomputing
from tritonq.functional.residual import residual_join
from tritonq.reference.activation import rectify
from tritonq.reference.conv_bn import BatchNormState, update_running_statistics
from tritonq.reference.fold import fold_bias, fold_scale, scale_out_channels

# The ceiling of a plain ReLU.
RELU = math.inf
# Where a module keeps the observer hook that its operator took over: its key, and the hook.
HOOK = "_tritonq_hook"
# Where a module of torch.ao has the mark that tritonq computes it.
MARK = "_tritonq_mark"


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """Tensors and constants of a library's BatchNorm, as a step needs them.

    Attributes:
        gamma: (channels,), or None for 1.
        beta: (channels,), or None for 0.
        running_mean: (channels,); training updates it in place.
        running_var: as ``running_mean``.
        momentum: weight of the new batch; for a cumulative average a 0-d tensor, 1 / number of batches so far. Not read
            if not ``training``.
        eps: added to the variance.
        training: whether the batch's own statistics normalize, and update the running ones.
        corrected: whether training folds the updated running variance (torch.ao's slow path).
    """

    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    momentum: float | Tensor
    eps: float
    training: bool
    corrected: bool = False

    def for_step(self) -> BatchNormState:
        """Return running mean and variance themselves, for this step to update in place, with momentum and eps.

        If activation checkpointing runs the step again, return copies of both and momentum 0: nothing counts twice.
        """
        if is_recomputing():
            return BatchNormState(self.running_mean.clone(), self.running_var.clone(), 0.0, self.eps)
        return BatchNormState(self.running_mean, self.running_var, self.momentum, self.eps)


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or matrix product, what follows it, and the quantizers of its weight and its result.

    Attributes:
        op: the convolution or product.
        weight_quantizer: rounds the weight, or the folded weight; None: it stays in float.
        output_quantizer: rounds the result; None: it stays in float.
        ceiling: of the ReLU: infinity for a plain one, 6.0 for ReLU6, None for none.
        grouping: whether ``op`` is a transposed convolution, and its number of groups, read only if it is.
        memory: where a training step leaves what it read and then changed, in case activation checkpointing runs it
            again. Give one that lasts from step to step (``step_memory_of``); by default it is new and empty.
    """

    op: LinearMap
    weight_quantizer: nn.Module | None = None
    output_quantizer: nn.Module | None = None
    ceiling: float | None = None
    grouping: tuple[bool, int] = (False, 1)
    memory: StepMemory = field(default_factory=StepMemory)


def affine(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``FQ(relu?(op(x, FQ(weight)) + bias))`` of a layer without BatchNorm.

    Quantizers whose observers are switched on update their ranges in place.

    Args:
        layer: the operation, its ReLU and its quantizers.
        x: its input.
        weight: the float weight, as ``layer.op`` takes it.
        bias: (out,) or None.
    """
    return _finish(layer, layer.op(x, _quantized_weight(layer, weight), bias))


def normalized(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> Tensor:
    """Return the result of a layer with BatchNorm, as torch.ao's ConvBn computes it.

    With ``σ(variance) = sqrt(variance + norm.eps)`` and ``s = γ/σ(running_var)``:

    - ``norm.training``: ``FQ(relu?(BN(op(x, FQ(W s)) / s + b)))``; BN normalizes by the batch and updates the running
      statistics in place. A channel with γ = 0 takes 1/σ for s, where the libraries divide by zero.
    - ``norm.training`` and ``norm.corrected``: the running statistics are updated first, in place; then, with mean μ
      and variance v of this batch's ``op(x, W)``,
      ``FQ(relu?(op(x, FQ(W s)) σ(running_var)/σ(v) + β - γ μ/σ(v)))``.
    - Not training: ``FQ(relu?(op(x, FQ(W s)) + β + (b - running_mean) s))``.

    Args:
        layer: the operation, its ReLU and its quantizers; those whose observers are switched on update their ranges.
        x: its input.
        weight: W in float, as ``layer.op`` takes it, not folded.
        bias: b, (out,); None for 0.
        norm: the BatchNorm.
    """
    if not norm.training:
        scale = fold_scale(norm.running_var, norm.gamma, norm.eps)
        folded = _quantized_weight(layer, scale_out_channels(weight, scale, *layer.grouping))
        shift = fold_bias(bias, norm.running_mean, scale, norm.beta).to(x.dtype)
        return _finish(layer, layer.op(x, folded, shift))
    if norm.corrected:
        return _corrected(layer, x, weight, bias, norm)
    known = _weight_state(layer, weight)
    if known is None and layer.weight_quantizer is not None:
        return _composed(layer, x, weight, bias, norm)
    return _one_operator(layer, x, weight, bias, norm, known)


def add(a: Tensor | float, b: Tensor | float, quantizer: nn.Module | None, ceiling: float | None) -> Tensor:
    """Return ``FQ(relu?(a + b))``; without FQ if ``quantizer`` is None. One of ``a`` and ``b`` may be a number.

    ``ceiling`` is that of the ReLU, as in :class:`Layer`. A quantizer that observes updates its range in place. For two
    tensors of the same shape and dtype the backward keeps one bit per element, if ``quantizer`` is None or follows a
    running range with one scale; other quantizers keep the sum, too.
    """
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return _finish_with(quantizer, cast(Tensor, a + b), ceiling)
    known = _output_state(quantizer, a)
    if quantizer is not None and known is None:
        return quantize(quantizer, residual_join(a, b, None, None, ceiling))
    grid, statistics = known or (None, None)
    y = residual_join(a, b, grid, statistics, ceiling)
    return y if grid is None else marked(y, grid)


def _one_operator(
    layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, norm: BatchNorm, known: State | None
) -> Tensor:
    x_padded, op = layer.op.padded(x)
    output = _output_state(layer.output_quantizer, x)
    weight_grid, weight_statistics = known or (None, None)
    output_grid, output_statistics = output or (None, None)
    step = ConvBnStep(
        op,
        norm.for_step(),
        weight_grid,
        weight_statistics,
        output_grid,
        output_statistics,
        source_of(x) if x_padded is x else None,
        layer.ceiling,
        layer.memory,
    )
    y = conv_bn(x_padded, weight, bias, norm.gamma, norm.beta, step)
    if output_grid is not None:
        return marked(y, output_grid)
    return y if layer.output_quantizer is None else quantize(layer.output_quantizer, y)


def _composed(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> Tensor:
    """Return ``FQ(relu?(BN(op(x, FQ(W s)) / s + b)))`` of a training step, computed as single operations.

    It is for a weight's quantizer that no fused operator takes. ``s`` is γ/σ(running_var), and 1/σ where γ is 0.
    """
    running_var = norm.running_var.clone()
    scale = fold_scale(running_var, norm.gamma, norm.eps)
    if norm.gamma is not None:
        scale = torch.where(norm.gamma == 0, torch.rsqrt(running_var + norm.eps), scale)
    y = layer.op(x, _quantized_weight(layer, scale_out_channels(weight, scale, *layer.grouping)))
    y = y / _along_channels(scale, y, layer)
    if bias is not None:
        y = y + _along_channels(bias, y, layer)
    state_ = norm.for_step()
    mean, var, gamma, beta = state_.running_mean, state_.running_var, norm.gamma, norm.beta
    momentum = float(state_.momentum)
    return _finish(layer, F.batch_norm(y, mean, var, gamma, beta, True, momentum, norm.eps))


def _corrected(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> Tensor:
    """Return the result of torch.ao's slow path: fold the updated running variance, then rescale to the batch's.

    ``FQ(relu?(op(x, FQ(W s)) σ(running_var)/σ_b + β - γ μ/σ_b))`` with ``s = γ/σ(running_var)``, and mean μ and
    deviation σ_b of ``op(x, W)``. The operation runs twice.
    """
    c = layer.op(x, weight)
    mean, var = channel_moments(c)
    kept = norm.for_step()
    with torch.no_grad():
        batch_mean = mean if bias is None else mean + bias
        update_running_statistics(kept, batch_mean, var, c.numel() // c.shape[1])
    running_var, inverse_std = kept.running_var, torch.rsqrt(var + norm.eps)
    scale = fold_scale(running_var, norm.gamma, norm.eps)
    y = layer.op(x, _quantized_weight(layer, scale_out_channels(weight, scale, *layer.grouping)))
    y = y * _along_channels(torch.sqrt(running_var + norm.eps) * inverse_std, y, layer)
    shift = -mean * (inverse_std if norm.gamma is None else norm.gamma * inverse_std)
    if norm.beta is not None:
        shift = shift + norm.beta
    if bias is not None:
        shift = shift + (bias - bias)
    return _finish(layer, y + _along_channels(shift, y, layer))


def _quantized_weight(layer: Layer, weight: Tensor) -> Tensor:
    return weight if layer.weight_quantizer is None else quantize(layer.weight_quantizer, weight)


def _weight_state(layer: Layer, weight: Tensor) -> State | None:
    """Return grid and range of the weight's quantizer for the fused Conv-BN operator; None if it can't take them.

    It takes a quantizer that follows a range, with one scale for the weight or one for each out channel on axis 0. It
    takes no transposed convolution, no float64 weight with one scale, no quantizer that :func:`can_compute` refuses.
    """
    quantizer = layer.weight_quantizer
    if quantizer is None or not can_compute(quantizer, weight) or layer.grouping[0]:
        return None
    if formula_of(quantizer).kind != "range":
        return None
    if weight.dtype == torch.float64 and formula_of(quantizer).qtype.axis is None:
        return None  # torch rounds such weights to float32, which products of codes and scale are not
    return state(quantizer, weight) if formula_of(quantizer).qtype.axis in (None, 0) else None


def _output_state(quantizer: nn.Module | None, like: Tensor) -> State | None:
    if quantizer is None or not can_compute(quantizer, like):
        return None
    formula = formula_of(quantizer)
    return state(quantizer, like) if formula.kind == "range" and formula.qtype.axis is None else None


def _finish(layer: Layer, y: Tensor) -> Tensor:
    return _finish_with(layer.output_quantizer, y, layer.ceiling)


def _finish_with(quantizer: nn.Module | None, y: Tensor, ceiling: float | None) -> Tensor:
    return rectify(y, ceiling) if quantizer is None else quantize_rectified(quantizer, y, ceiling)


def _along_channels(vector: Tensor, y: Tensor, layer: Layer) -> Tensor:
    shape = [1] * y.dim()
    shape[layer.op.output_axis] = -1
    return vector.to(y.dtype).view(shape)
