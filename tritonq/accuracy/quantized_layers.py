"""The quantized layers of a prepared model: their order, their inputs, and writing weights through a BatchNorm.

The methods of this folder use it. The *rows* of a weight are all values of one out channel each: a tensor (out, ...),
whatever the layer. A batch is a pair of positional arguments and keyword arguments of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from tritonq.calibration import Batch
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.nn.call_arguments import by_position
from tritonq.nn.qat import QATLayer
from tritonq.prepare.record.structure import tensors_in


def owns_weight(module: nn.Module) -> TypeGuard[QATLayer]:
    """Whether ``module`` is a quantized convolution or linear layer with a weight of its own.

    False for a weight that is computed from other parameters, such as a RepVGG block's, for embeddings and for
    recurrent layers.
    """
    return isinstance(module, QATLayer) and module.computed is None and "weight" in module._parameters


def layers_in_order(model: nn.Module, batch: Batch) -> dict[str, QATLayer]:
    """Return by qualified name the layers of :func:`owns_weight`, in the order in which running ``batch`` meets them.

    The model runs once, in its present modes. Layers that do not run are left out.

    Raises:
        ValueError: no such layer runs.
    """
    layers = {module: name for name, module in model.named_modules() if isinstance(module, QATLayer)}
    found: dict[str, QATLayer] = {}

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if owns_weight(layer):
            found.setdefault(layers[layer], layer)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        args, kwargs = batch
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(f"{type(model).__name__} runs no quantized layer with a weight of its own: call prepare_qat")
    return found


def check_rounds_to_nearest(layers: Mapping[str, QATLayer], what: str) -> None:
    """Raise ValueError if a layer's quantizer does not round each weight to its nearest integer code.

    Float formats do not, nor do quantizers whose codes follow from a formula of the whole weight
    (`tritonq.paper_schemes`).

    Args:
        layers: by qualified name, which the error gives.
        what: the method that needs rounding to the nearest, with which the error's text begins: ``"adaptive_round"``.
    """
    for name, layer in layers.items():
        quantizer = layer.weight_fake_quant
        if isinstance(quantizer, FloatFakeQuantize):
            raise ValueError(f"{what} is for integer codes, and layer {name!r} has weights in {quantizer.format}")
        if not getattr(quantizer, "rounds_to_nearest", True):
            raise ValueError(
                f"{what} changes which of two codes next to a weight is taken; {type(quantizer).__name__}, of layer "
                f"{name!r}, makes its codes by a formula of the whole weight: use running ranges or trained scales"
            )


def inputs_of(model: nn.Module, layer: QATLayer, batches: Sequence[Batch]) -> list[Tensor]:
    """Run the batches and return the inputs of one layer, one tensor per call of it, detached and not copied.

    They are what its convolution or product reads: rounded by the layer's ``input_fake_quant``, if it has one. The
    model runs in its present modes. The list is empty if the layer does not run.
    """
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(layer.quantized_input(by_position(module, args, kwargs)[0]).detach())

    hook = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for args, kwargs in batches:
            model(*args, **kwargs)
    finally:
        hook.remove()
    return found


def float_outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Run a batch and return the floating-point tensors in the model's result, in order and not copied.

    The result may nest tuples, lists, dicts and dataclasses.
    """
    args, kwargs = batch
    return [tensor for _, tensor in tensors_in(model(*args, **kwargs)) if tensor.is_floating_point()]


def fold_factors(layer: QATLayer) -> Tensor:
    """Return ``γ/sqrt(running_var + eps)`` per out channel, (out,), detached; ones for a layer without BatchNorm."""
    if isinstance(layer, QATBatchNormLayer):
        return layer.fold_factors().detach()
    return layer.weight.new_ones(layer.linear_map.to_rows(layer.weight).shape[0])


@torch.no_grad()
def write_quantized_weight(layer: QATLayer, rows: Tensor, where: Tensor) -> None:
    """Set elements of the layer's weight so that ``layer.weight_to_quantize()`` is equal to ``rows`` there.

    That is the weight times a factor per channel: that of :func:`fold_factors`, or, in mode ``"scale"``, -1 where γ < 0
    and else 1. The elements become ``rows / factor``. Channels whose factor or whole weight is 0 stay as they are.

    Args:
        layer: one that owns its weight, which changes in place.
        rows: the values that ``weight_to_quantize`` is to have, (out, ...).
        where: bool, shaped as ``rows``: which elements are set.
    """
    op = layer.linear_map
    own, seen = op.to_rows(layer.weight), op.to_rows(layer.weight_to_quantize())
    # The quantizer sees the weight times a factor per channel: that of its largest value.
    index = seen.flatten(1).abs().argmax(1, keepdim=True)
    factors = (seen.flatten(1).gather(1, index) / own.flatten(1).gather(1, index)).view(-1, *[1] * (own.dim() - 1))
    usable = where & factors.isfinite() & (factors != 0)
    layer.weight.copy_(op.from_rows(torch.where(usable, rows / factors, own)))


@torch.no_grad()
def write_folded_weight(layer: QATLayer, rows: Tensor) -> None:
    """Set the layer's weight so that, multiplied by the BatchNorm's factors of eval mode, it is ``rows`` (out, ...).

    A channel whose factor is 0 stays as it is.
    """
    op, factors = layer.linear_map, fold_factors(layer).view(-1, *[1] * (rows.dim() - 1))
    unfolded = torch.where(factors == 0, op.to_rows(layer.weight), rows / factors.where(factors != 0, 1.0))
    layer.weight.copy_(op.from_rows(unfolded))


@torch.no_grad()
def add_to_bias(layer: QATLayer, shift: Tensor) -> bool:
    """Add ``shift``, (out,), in place to the layer's bias, or to β of its BatchNorm; return whether there is one."""
    bias = layer.bn.bias if isinstance(layer, QATBatchNormLayer) else layer.bias
    if bias is None:
        return False
    bias.add_(shift.to(bias.dtype))
    return True
