"""The computations of a quantization-aware layer in eval mode, and in training without a BatchNorm.

`tritonq.nn.paths` chooses among them. Each takes the layer, its float input, and its weight and bias (None without
one), neither folded nor rounded, and returns the layer's float output. ``op`` is the layer's convolution or product;
FQ_w and FQ_a are fake quantization of weight and output, ``relu?`` is the layer's activation. W and b are weight and
bias with the BatchNorm folded in by its running statistics, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.codes import can_use_codes
from tritonq.functional.conv2d import find_kernel, run_integer_layer
from tritonq.functional.gradients import needs_gradient, with_gradient_of
from tritonq.functional.integer import IntegerAffine
from tritonq.functional.integer_kernels import PackedLayer, pack, run_packed
from tritonq.functional.memo import held_tensors
from tritonq.nn.fusable import fixed_grid
from tritonq.nn.paths import Path
from tritonq.nn.qat import QATLayer


def train(layer: QATLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``FQ_a(relu?(op(x, FQ_w(W)) + b))``, computed in float: a training step without a BatchNorm.

    FQ_w and FQ_a observe, while their observers are on.
    """
    weight, bias = layer.folded_parameters(weight, bias)
    weight, grid = layer.weight_to_map(weight)
    return layer.quantized_output(layer.mapped(x, weight, bias, grid))


def eval_float(layer: QATLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``FQ_a(relu?(op(x, FQ_w(W)) + b))`` of eval mode, computed in float; differentiable.

    On a GPU one kernel computes op and ReLU of a 2-d convolution, at sizes where this was measured to be faster.
    """
    weight, bias = layer.folded_parameters(weight, bias)
    op, quantized = layer.linear_map, layer.quantized_folded_weight(weight)
    kernel = find_kernel(x, weight, op) if layer.ends_in_ceiling else None
    if kernel is None:
        return layer.quantized_output(op(x, quantized, bias))
    output = None if needs_gradient(layer, x, weight, bias) else fixed_grid(layer.activation_post_process)
    y = kernel(x, quantized, bias, layer.ceiling, output)
    return y if output is not None else cast(Tensor, layer.activation_post_process(y))


def eval_integers(layer: QATLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``FQ_a(relu?(op(x, FQ_w(W)) + b))`` of eval mode, with sums in integers and the bias as int32 codes.

    ``x`` must lie on the grid of the layer's input quantizer. `QATLayer.integer_quantizers` must return quantizers of
    input and weight, not None, and both must have their grids and be switched on. The gradient is that of the same
    formula computed in float.
    """
    if can_use_codes(x):
        packed = _run_packed(layer, x, weight, bias)
        if packed is not None:
            return packed
    weight, bias = layer.folded_parameters(weight, bias)
    op, integers = layer.linear_map, cast(IntegerAffine, layer.integer_layer(weight, bias))
    needs_grad = needs_gradient(layer, x, weight, bias)
    kernel = find_kernel(x, weight, op, integers)
    if kernel is not None and layer.ends_in_ceiling and not needs_grad:
        output = fixed_grid(layer.activation_post_process)
        y = kernel.integers(x, integers, layer.output_grid(), layer.ceiling, output)
        return y if output is not None else cast(Tensor, layer.activation_post_process(y))
    with torch.no_grad():
        y = run_integer_layer(x, integers, op, layer.output_grid(), kernel)
    if needs_grad:
        y = with_gradient_of(y, op(x, layer.quantized_folded_weight(weight), bias))
    return layer.quantized_output(y)


def _run_packed(layer: QATLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return the result of :func:`eval_integers`, computed by torch's integer kernels.

    The layer in the form of these kernels is kept until a tensor or setting of it changes. None if the kernels can't
    run the layer, or if a gradient is needed.
    """
    source, quantizer = cast(FakeQuantizeBase, layer.input_quantizer), layer.activation_post_process
    output = layer.output_quantizer()
    held = (*held_tensors(layer), *held_tensors(source), *(() if output in (None, quantizer) else held_tensors(output)))
    if weight is not layer._parameters.get("weight"):  # computed of other parameters
        held = (weight, bias, *held)
    if needs_gradient(layer, *held):
        return None
    is_rounded = output is not None and output.is_enabled_on_host()
    if is_rounded and (quantizer._forward_pre_hooks or not layer.ends_in_ceiling):
        return None

    def make() -> PackedLayer | None:
        integers = cast(IntegerAffine, layer.integer_layer(*layer.folded_parameters(weight, bias)))
        return pack(integers, layer.linear_map, source.grid(), layer.output_grid(), layer.ceiling)

    # Averages of weights are often written through `data`, which leaves the tensor's version as it was.
    sums = [float(tensor.sum()) for tensor in held if tensor is not None and tensor.dim() > 1]
    key = (sums, layer.eval_key(), is_rounded, quantizer, getattr(output, "qtype", None))
    packed = layer.packed.get(held, make, key)
    y = None if packed is None else run_packed(x, packed)
    if y is None:
        return None
    if not is_rounded:
        return layer.quantized_output(y)
    # Who listens to the quantizer's results is told.
    return cast(Tensor, quantizer(y)) if quantizer._forward_hooks else y


def eval_traced(layer: QATLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``FQ_a(relu?(op(x, FQ_w(W)) + b))`` of eval mode in a graph of ``torch.compile``.

    When it runs, the graph reads the switches of the quantizers of input and weight: if both round, sums are computed
    in integers, else in float. If `QATLayer.integer_quantizers` is None, because a grid does not allow integer sums,
    they are always computed in float.
    """
    weight, bias = layer.folded_parameters(weight, bias)
    op, quantizers = layer.linear_map, layer.integer_quantizers()
    if quantizers is None:
        return layer.quantized_output(op(x, layer.quantized_folded_weight(weight), bias))
    from tritonq.functional.traced import eval_mode

    output = layer.output_quantizer()
    padded, plain = op.padded(x)
    grids = (quantizers[0].grid(), layer.weight_grid(), None if output is None else output.grid())
    y = eval_mode.affine(padded, layer.weight_near_codes(weight), bias, plain, op.output_axis, *grids)
    if needs_gradient(layer, x, weight, bias):
        # The compiler drops the surrogate's own value.
        y = with_gradient_of(y, op(x, layer.quantized_folded_weight(weight), bias))
    return layer.quantized_output(y)


PATHS: dict[Path, Callable[..., Tensor]] = {
    "train": train,
    "eval_traced": eval_traced,
    "eval_integers": eval_integers,
    "eval_float": eval_float,
}
