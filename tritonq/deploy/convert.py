"""From a model trained with fake quantization to the model that is deployed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from tritonq.deploy.computed import drop_computations
from tritonq.deploy.convertible import WEIGHTED, check_convertible, check_finite, warn_if_untrained
from tritonq.deploy.embedding_tables import deployed_table
from tritonq.deploy.fixed_point import convert_fixed_point, has_fixed_point
from tritonq.deploy.float_quantizer import FloatQuantizer
from tritonq.deploy.hooked_weights import settle_weights
from tritonq.deploy.layer_types import LAYER_TYPES
from tritonq.deploy.modules import CodeTypes, DeployedModule, QuantizedLayer, Quantizer
from tritonq.deploy.recurrent import deployed_recurrent
from tritonq.deploy.swap import swap_modules
from tritonq.deploy.weight_codes import QUANTIZERS, codes_of_weight, rounds, unless_zero, weight_type
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.functional.codes import carry_codes
from tritonq.nn import Embedding, EmbeddingBag, Joint, QATLayer, QATRecurrent, QATRepVGGBlock
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.nn.compile_wrapper import uncompiled
from tritonq.nn.one_sided import warn_of_weight_zero_points
from tritonq.nn.own_input import INPUT_QUANTIZER
from tritonq.nn.unary import UnaryLayer
from tritonq.prepare.changes import note_report, take_report, warn_of_changes
from tritonq.prepare.edit.earlier_inputs import replace_hooks
from tritonq.prepare.edit.swap import take_place_again
from tritonq.prepare.forwards.edited import apply_forward, quantizer_names, quantizing_part
from tritonq.prepare.record.snapshot import copied, undone_on_error
from tritonq.quantized_type import QuantizedType


def convert(model: nn.Module, inplace: bool = False, *, allow_unquantized: bool = False) -> nn.Module:
    """Return the deployed model of a quantization-aware one: integer weights, int32 biases, fixed quantizers.

    Every quantization-aware layer, its BatchNorm included, becomes one deployed layer (where the input is not rounded,
    it computes in float, with the rounded values of its weight); every fake quantizer becomes a fixed one; everything
    else stays, in eval mode, and so do hooks. The result gives the same codes as ``model`` in eval mode, bit for bit,
    and has no other mode: ``train()`` on it raises RuntimeError. A fixed-point network becomes one of 8-bit codes,
    32-bit sums and shifts.

    It warns (UserWarning) of quantizers that no training step reached, of modules put into the model after
    `prepare_qat`, and of weight zero points that differ between channels.

    Args:
        model: a trained model with quantization-aware layers, in any mode; also the result of ``torch.compile`` of one.
        inplace: change ``model`` itself, not a copy. Use the result: a model of one layer becomes another module.
        allow_unquantized: whether tensors may stay in float because their quantizer has never observed anything or is
            switched off; it becomes an ``nn.Identity``. By default that is an error: usually the model was not trained.
            In a fixed-point network it is an error always.

    Returns:
        The converted model.

    Raises:
        ValueError: a model that is not prepared or is converted already, a parameter, BatchNorm statistic or scale that
            is not finite, a quantizer that rounds nothing (without ``allow_unquantized``), float64 parameters, or a
            weight, number format or layer type that can't be deployed; in a fixed-point network also a layer in another
            phase than "fixed", with a float bias or with words of more than 8 bits, or a module put in after
            `prepare_qat`. The message names the module, if the fault is in one. ``model`` is then as it was.

    Examples:
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> x = torch.randn(4, 3, 8, 8)
        >>> qat = tritonq.prepare_qat(model, example_inputs=x).train()
        >>> _ = qat(x)                         # training steps
        >>> int8 = convert(qat)
        >>> int8[0].stored_weight.dtype, torch.equal(int8(x), qat.eval()(x))
        (torch.int8, True)
    """
    model = uncompiled(model)
    check_finite(model)
    if has_fixed_point(model):
        return convert_fixed_point(model, inplace)
    check_convertible(model, allow_unquantized)
    warn_if_untrained(model, stacklevel=2)
    warn_of_changes(model, stacklevel=2)
    converted = model if inplace else copied(model)
    with undone_on_error(converted) if inplace else nullcontext():
        records = take_report(converted)
        replace_hooks(converted)
        for layer in converted.modules():
            if isinstance(layer, QATLayer):
                settle_weights(layer)
        computed = [layer.computed for layer in converted.modules() if isinstance(layer, QATLayer) and layer.computed]
        with torch.no_grad():
            replacements = _replacements(converted)
        for module in converted.modules():
            if isinstance(module, Joint):
                module.replace_producers(replacements)
            elif isinstance(module, UnaryLayer):
                module.replace_quantizers(replacements)
            elif isinstance(module, QATLayer):
                # Modules of the copy, not of the model that is converted.
                cast(QuantizedLayer, replacements[module]).set_quantizer_behind_clip(
                    replacements.get(cast(nn.Module, module.quantizer_behind_clip))
                )
        converted = swap_modules(converted, replacements).eval()
        drop_computations(converted, computed)
        if records is not None:
            note_report(converted, records)
    warn_of_weight_zero_points(_with_own_zero_points(converted), stacklevel=2)
    # A single layer has nothing to carry codes to.
    return converted if isinstance(converted, DeployedModule) else carry_codes(converted)


def _with_own_zero_points(converted: nn.Module) -> list[str]:
    """Return the names of layers in integers whose weight zero points differ between out channels."""
    layers = [(name, module) for name, module in converted.named_modules() if isinstance(module, QuantizedLayer)]
    zeros = [(name, layer.weight_zero_point) for name, layer in layers if not layer.has_groups]
    return [name for name, zero in zeros if zero is not None and int(zero.min()) != int(zero.max())]


def _replacements(model: nn.Module) -> dict[nn.Module, nn.Module]:
    known = (module for module in model.modules() if isinstance(module, QUANTIZERS) and module.qtype is not None)
    quantizers: dict[nn.Module, nn.Module] = {module: _quantizer(module) for module in known}
    replacements: dict[nn.Module, nn.Module] = dict(quantizers)
    for name, module in model.named_modules():
        try:
            if isinstance(module, QATLayer):
                output = module.activation_post_process
                made = replacements[module] = _layer(module, quantizers.get(output, output))
                made.target = module.qconfig.target
            elif isinstance(module, QATRecurrent):
                replacements[module] = deployed_recurrent(module, quantizers)
            elif isinstance(module, (Embedding, EmbeddingBag)):
                replacements[module] = deployed_table(module)
        except ValueError as error:
            raise ValueError(f"{name!r} can't be converted: {error}") from error
    for module, replacement in replacements.items():
        own_input = module._modules.get(INPUT_QUANTIZER)
        if own_input is not None:
            replacement.add_module(INPUT_QUANTIZER, quantizers.get(own_input, own_input))
        if isinstance(module, WEIGHTED):
            take_place_again(module, replacement)
        _keep_quantizers(module, replacement, quantizers)
    return replacements


def _keep_quantizers(module: nn.Module, made: nn.Module, quantizers: Mapping[nn.Module, nn.Module]) -> None:
    """Make a deployed module quantize the arguments and results that the original's forward quantized.

    Args:
        module: the prepared module; nothing happens if its forward quantizes nothing.
        made: the deployed module, changed in place.
        quantizers: the deployed quantizer of each quantizer of training.
    """
    data = quantizing_part(module)
    if data is None:
        return
    for name in quantizer_names(data):
        child = module._modules[name]
        made.add_module(name, quantizers.get(child, child))  # type: ignore[arg-type]
    apply_forward(made, data, quantizer_names(data))


def _quantizer(source: FakeQuantizeBase | FloatFakeQuantize) -> nn.Module:
    if not rounds(source):
        return nn.Identity()
    if isinstance(source, FloatFakeQuantize) or source.qtype.float_format is not None:
        grid = source.grid()
        return FloatQuantizer(grid.qtype, grid.scale.detach().clone())
    return Quantizer(source.qtype, *map(torch.clone, source.calculate_qparams()))


def _layer(layer: QATLayer, output: nn.Module) -> QuantizedLayer:
    if isinstance(layer, QATRepVGGBlock):
        # The merged convolution has the shape of its largest branch.
        made = _layer_like(layer, layer.conv3, output)
        if layer.ceiling is None and layer.activation is not None and type(layer.activation) is not nn.Identity:
            made.add_module("activation", layer.activation)
        return made
    made = _layer_like(layer, layer, output)
    made.takes_weight = layer.computed is not None
    return made


def _layer_like(layer: QATLayer, shape: nn.Module, output: nn.Module) -> QuantizedLayer:
    """Return the deployed form of ``layer``: integer codes if the grids of input and weight are known, else float.

    ``shape`` is the module that gives the geometry (strides and the like) and the deployed type: a Conv2d, Linear, ....
    ``output`` is the deployed quantizer of the layer's result.

    Raises:
        ValueError: ``shape`` is of no class in :data:`LAYER_TYPES`, or the weight has no deployed form.
    """
    target = next((made for source, made in LAYER_TYPES.items() if isinstance(shape, source)), None)
    if target is None:
        known = ", ".join(source.__name__ for source in LAYER_TYPES)
        raise ValueError(f"{type(layer).__name__} is none of {known}")
    weight, bias = layer.folded_parameters()
    geometry = {name: getattr(shape, name) for name in target.geometry_names}
    integers = layer.integer_layer(weight, bias)
    grid = _weight_grid(layer)
    if integers is None:
        tensors = _float_tensors(layer, weight, bias, grid)
        return target(geometry, CodeTypes(grid, None), tensors, layer.ceiling, output)
    source = cast(FakeQuantizeBase, layer.input_quantizer)
    grid = cast(QuantizedType, grid)
    zero = cast(Tensor, integers.weight_zero_point)
    rows = layer.linear_map.to_rows(integers.weight) + zero.view(-1, *[1] * (integers.weight.dim() - 1))
    input_scale, input_zero_point = source.calculate_qparams()
    integer_tensors = {
        "weight": layer.linear_map.from_rows(rows).to(grid.storage_dtype),
        "weight_scale": integers.weight_scale.clone(),
        "weight_zero_point": unless_zero(zero.clone()),
        "bias": integers.bias,
        "multiplier": integers.multiplier,
        "input_scale": input_scale.reshape(1).clone(),
        "input_zero_point": input_zero_point.reshape(1).clone(),
    }
    return target(geometry, CodeTypes(grid, source.qtype), integer_tensors, layer.ceiling, output)


def _weight_grid(layer: QATLayer) -> QuantizedType | None:
    """Return the quantized type of a layer's weight; None if the weight stays in float.

    Raises:
        ValueError: the weight quantizer is of a class without a grid.
    """
    quantizer = layer.weight_fake_quant
    if isinstance(quantizer, nn.Identity):
        return None
    if not isinstance(quantizer, QUANTIZERS):
        raise ValueError(f"a weight quantizer of type {type(quantizer).__name__} has no grid")
    return weight_type(quantizer)


def _float_tensors(
    layer: QATLayer, weight: Tensor, bias: Tensor | None, grid: QuantizedType | None
) -> dict[str, Tensor | None]:
    """Return the tensors of a converted layer that computes in float, by their names in its state dict.

    Args:
        layer: the layer of training.
        weight: its weight, with the BatchNorm folded in.
        bias: its bias, likewise; None without one.
        grid: quantized type of the weight; None: the weight stays in float.

    Returns:
        ``weight`` and ``bias``; with a grid ``weight`` holds codes, and there are ``weight_scale`` and
        ``weight_zero_point`` (None if all are 0).

    Raises:
        ValueError: blocks of floats with folding "scale".
    """
    bias = None if bias is None else bias.clone()
    if grid is None:
        return {"weight": weight.clone(), "bias": bias}
    quantizer = cast(FakeQuantizeBase | FloatFakeQuantize, layer.weight_fake_quant)
    has_blocks = isinstance(quantizer, FloatFakeQuantize) and quantizer.blocks is not None
    if has_blocks and isinstance(layer, QATBatchNormLayer) and layer.qconfig.folding == "scale":
        raise ValueError(
            f'{quantizer.format} has no deployed form with folding="scale": its blocks are those of W alone'
        )
    rows = layer.linear_map.to_rows(layer.weight_near_codes(weight))
    codes, scale, zero = codes_of_weight(rows, quantizer, layer.weight_grid)
    zero_point = unless_zero(zero)
    return {
        "weight": layer.linear_map.from_rows(codes),
        "weight_scale": scale,
        "weight_zero_point": zero_point,
        "bias": bias,
    }
