"""A converted model rewritten for tracing: quantizers and integer weights as operators that translate to ONNX.

ONNX Runtime: activations are uint8 whatever the trained type, shifted so that the smallest code is 0. It fuses
``DequantizeLinear → Conv → QuantizeLinear`` into an integer convolution on x86 for uint8 with a Clip behind it, but for
int8 only without one (1.31, tried). Saturation at 0 then is the lower bound of the range, and the ReLU where one comes
before the quantizer: ``quantize(relu(y)) = max(z, quantize(y))``. An upper bound below 255 becomes a Clip on codes, and
so does the 6 of a ReLU6: rounding keeps the order, hence ``quantize(min(y, 6)) = min(quantize(y), quantize(6))``.
Where the range ends at 255 before that there is no Clip.
QuantizeLinear divides and rounds half to even. A quantizer that no integer operation runs together with, such as the
model input's, rounds exactly as trained instead: the quotient is computed before a QuantizeLinear of scale 1.

TensorRT: int8 with zero point 0; float weights between QuantizeLinear and DequantizeLinear; float bias. A ReLU stays,
its upper bound too unless the quantizer saturates before it, and a range narrower than int8 becomes a clamp before
QuantizeLinear: TensorRT fuses both into the convolution. What its integers can't hold is written as float arithmetic.

The plain form, ``"qdq"``: the trained grids as they are, each a QuantizeLinear and a DequantizeLinear with the same
scale and zero point and nothing between; weights and biases as for ONNX Runtime, ReLUs and clamps as for TensorRT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from tritonq.deploy.embedding_tables import QuantizedTable
from tritonq.deploy.float_quantizer import FloatQuantizer
from tritonq.deploy.modules import DeployedModule, QuantizedLayer, QuantizedTransposed, Quantizer
from tritonq.deploy.onnx_average_pool import rewrite_average, rewrite_global_average
from tritonq.deploy.onnx_clips import absorb_clips, unchanged
from tritonq.deploy.onnx_floats import FLOAT_DTYPES, TracedFloatQuantizer
from tritonq.deploy.onnx_functions import CodeTable, code_table, rewrite_function
from tritonq.deploy.onnx_joins import rewrite_join
from tritonq.deploy.onnx_ops import dequantize, quantize_dequantize
from tritonq.deploy.onnx_packed import PACKED_OPSET
from tritonq.deploy.onnx_quantizers import TracedQuantizer, end_codes, grids_of, plain_quantizer, uint8_quantizer
from tritonq.deploy.onnx_recurrent import rewrite_recurrent
from tritonq.deploy.onnx_tables import rewrite_table
from tritonq.deploy.onnx_tensorrt import int8_quantizer, runs_in_float, tell_float_layers
from tritonq.deploy.onnx_transposed import phases_of, rewrite_transposed
from tritonq.deploy.recurrent import QuantizedRecurrent
from tritonq.deploy.swap import swap_modules
from tritonq.nn import AverageLayer, Cat, FloatFunctional, Joint
from tritonq.nn.functions import FunctionLayer, PReLU
from tritonq.nn.original_class import original_class
from tritonq.nn.output_quantizer import quantizer_of
from tritonq.nn.unary import UnaryLayer
from tritonq.prepare.forwards.edited import set_inner_forward
from tritonq.prepare.record.snapshot import copied
from tritonq.quantized_type import QuantizedType
from tritonq.targets import OnnxForm

_OUTPUT = "activation_post_process"
_KNOWN = (Quantizer, FloatQuantizer, QuantizedLayer, QuantizedTable, QuantizedRecurrent)


def onnx_form(converted: nn.Module, target: OnnxForm) -> tuple[nn.Module, list[CodeTable]]:
    """Return a copy of a converted model that traces to Q/DQ operators for an engine, and the tables of its functions.

    Args:
        converted: the model.
        target: ``"onnxruntime"``, ``"tensorrt"`` or ``"qdq"``.

    Raises:
        ValueError: a quantizer or module that the target can't represent; the message names it.

    Warns:
        UserWarning: layers that TensorRT, if it is the target, will run in float.

    Returns:
        The copy, and for ONNX Runtime the trained codes of each function but PReLU whose input and output have one grid
        each; for other targets the list is empty.
    """
    for name, module in converted.named_modules():
        if isinstance(module, DeployedModule) and not isinstance(module, _KNOWN):
            raise ValueError(f"{type(module).__name__} {name!r} has no form in ONNX")
    model = copied(converted)
    quantizers = {module: name for name, module in model.named_modules() if isinstance(module, Quantizer)}
    joins = [module for module in model.modules() if isinstance(module, Joint)]
    # Before operations are rewritten to run their quantizers themselves.
    second = {join: quantizer_of(join.producers[1]) for join in joins}
    traced: dict[nn.Module, nn.Module]
    subtrahends: dict[Joint, nn.Module | None] = {}
    functions: list[tuple[FunctionLayer, str, str]] = []
    if target == "onnxruntime":
        clips = absorb_clips(model, quantizers)
        _absorb_relus(model, quantizers)
        _absorb_clip_modules(model, quantizers)
        fused = _behind_integers(model)
        forms = {
            module: clips.get(module) or uint8_quantizer(module, name, exact=module not in fused)
            for module, name in quantizers.items()
        }
        functions, placed = _rewrite_functions(model, quantizers, forms)
        placed |= _rewrite_averages(model, forms) | set(clips)
        traced = {module: nn.Identity() if module in placed else form for module, form in forms.items()}
        subtrahends = {join: _traced_quantizer(join.producers[1], second[join], forms) for join in joins}
    else:
        _drop_ceilings(model)
        if target == "tensorrt":
            tell_float_layers(model)
        for module in model.modules():
            if isinstance(module, AverageLayer):
                rewrite_global_average(module)
        form = int8_quantizer if target == "tensorrt" else plain_quantizer
        traced = {module: form(module, name) for module, name in quantizers.items()}
    for name, module in model.named_modules():
        if isinstance(module, FloatQuantizer):
            traced[module] = TracedFloatQuantizer(module, name, divides=target != "onnxruntime")
    for join in joins:
        join.replace_producers(traced)
    for module in model.modules():
        if isinstance(module, UnaryLayer):
            module.replace_quantizers(traced)
    model = swap_modules(model, traced)
    for join in joins:
        rewrite_join(join, subtrahends.get(join))
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            _rewrite_layer(module, target)
        elif isinstance(module, QuantizedTable):
            rewrite_table(module, in_float=target == "tensorrt")
        elif isinstance(module, QuantizedRecurrent):
            rewrite_recurrent(module, name, in_float=target == "tensorrt")
    ends = {module.name: module for module in model.modules() if isinstance(module, TracedQuantizer)}
    known = [found for found in functions if found[1] in ends and found[2] in ends]
    return model, [code_table(layer, ends[source], ends[output]) for layer, source, output in known]


def _rewrite_functions(
    model: nn.Module, names: dict[Quantizer, str], forms: dict[Quantizer, TracedQuantizer]
) -> tuple[list[tuple[FunctionLayer, str, str]], set[Quantizer]]:
    """Make functions with known grids trace to float operators and their quantizers.

    Args:
        model: changed in place.
        names: of the quantizers.
        forms: the traced form of each quantizer.

    Returns:
        Each function with the names of its input's and output's quantizer; and the quantizers that functions now run
        themselves.
    """
    found: list[tuple[FunctionLayer, str, str]] = []
    placed: set[Quantizer] = set()
    for module in model.modules():
        grids = grids_of(module) if isinstance(module, (FunctionLayer, PReLU)) else None
        if grids is not None:
            source, output = grids
            forms[output].exact = False
            rewrite_function(cast(FunctionLayer, module), output, forms[output])
            placed.add(output)
            if isinstance(module, FunctionLayer):
                found.append((module, names[source], names[output]))
    return found, placed


def _rewrite_averages(model: nn.Module, forms: dict[Quantizer, TracedQuantizer]) -> set[Quantizer]:
    """Make pools and means with known grids trace to sums of codes; return the quantizers that they now run themselves.

    ``forms`` has the traced form of each quantizer.
    """
    placed: set[Quantizer] = set()
    for name, module in model.named_modules():
        grids = grids_of(module) if isinstance(module, AverageLayer) else None
        if grids is not None:
            output = grids[1]
            forms[output].exact = False
            rewrite_average(cast(AverageLayer, module), name, forms[output])
            placed.add(output)
    return placed


def _absorb_relus(model: nn.Module, names: dict[Quantizer, str]) -> None:
    """Replace the ReLU before a quantizer by a lower bound of its codes, and a ReLU's upper bound by an upper one.

    The quantizer becomes a :class:`TracedQuantizer`, and the module's ``ceiling`` None. Those per channel stay.

    ``names`` has the name of each quantizer. ``model`` is changed in place.
    """
    for module in model.modules():
        if isinstance(module, (QuantizedLayer, Joint)) and module.ceiling is not None:
            output = module.activation_post_process
            if isinstance(output, Quantizer) and output.qtype.axis is None:
                bounds, module.ceiling = (0.0, module.ceiling), None
                exact = not _runs_in_integers(module)
                module.activation_post_process = uint8_quantizer(output, names[output], bounds, exact=exact)


def _drop_ceilings(model: nn.Module) -> None:
    """Make a plain ReLU (``ceiling`` infinity) of one with an upper bound, in place.

    That is done if the quantizer behind it saturates at that bound or below, so that the bound changes nothing.
    """
    for module in model.modules():
        if isinstance(module, (QuantizedLayer, Joint)) and module.ceiling is not None:
            output = module.activation_post_process
            if isinstance(output, Quantizer) and output.qtype.axis is None:
                _, highest = end_codes(output, (0.0, module.ceiling))
                module.ceiling = math.inf if highest == output.qtype.quant_max else module.ceiling


def _absorb_clip_modules(model: nn.Module, names: dict[Quantizer, str]) -> None:
    """Replace torch's ReLU, ReLU6 and Hardtanh, if they have a quantizer of their own, by the bounds of its codes.

    ``names`` has the name of each quantizer. Files of earlier versions hold ReLU6 and Hardtanh of this kind.
    """
    for module in model.modules():
        output = getattr(module, _OUTPUT, None)
        clips = original_class(module) in (nn.ReLU, nn.ReLU6, nn.Hardtanh)
        if clips and isinstance(output, Quantizer) and output.qtype.axis is None:
            bounds = (module.min_val, module.max_val) if isinstance(module, nn.Hardtanh) else (0.0, math.inf)
            set_inner_forward(module, unchanged)
            # Dividing at once: ONNX Runtime would quantize the weights of a float layer before QuantizeLinear.
            module.activation_post_process = uint8_quantizer(output, names[output], bounds, exact=True)


def _traced_quantizer(
    producer: nn.Module | None, quantizer: nn.Module | None, forms: Mapping[Quantizer, TracedQuantizer]
) -> TracedQuantizer | None:
    """Return the traced form of a module's output quantizer.

    Args:
        producer: the module, perhaps rewritten; None: there is none.
        quantizer: its quantizer before it was rewritten.
        forms: the traced form of each quantizer.

    Returns:
        The form that the module has now, whose codes may be bounded by a clip; else that in ``forms``. None if there
        is none, or one of float arithmetic.
    """
    now = quantizer_of(producer)
    if not isinstance(now, TracedQuantizer):
        now = forms.get(quantizer) if isinstance(quantizer, Quantizer) else None
    return now if _has_one_grid(now) else None


def _behind_integers(model: nn.Module) -> set[nn.Module]:
    """Return the output quantizers of operations that ONNX Runtime runs in integers together with the quantizer.

    These are layers on a known input grid whose weights ONNX can hold, joins whose operands all lie on known grids or
    none does, and concatenations.
    """
    return {
        module.activation_post_process
        for module in model.modules()
        if isinstance(module, (QuantizedLayer, Joint, Cat, FloatFunctional)) and _runs_in_integers(module)
    }


def _has_one_grid(quantizer: nn.Module | None) -> bool:
    """Whether a quantizer, rewritten for ONNX or not yet, gives codes that integer kernels of ONNX Runtime take."""
    if isinstance(quantizer, TracedQuantizer):
        return not quantizer.is_float
    return isinstance(quantizer, Quantizer) and quantizer.qtype.axis is None


def _runs_in_integers(module: nn.Module) -> bool:
    if isinstance(module, QuantizedLayer):
        is_plain = module.multiplier is not None and module.following is None and _weight_axis(module) is not None
        return is_plain or phases_of(module) is not None
    if isinstance(module, Joint):
        # Where an operand is not rounded, eval mode joins floats, and rounds them as any other value.
        known = [quantizer for quantizer in module.input_quantizers if _has_one_grid(quantizer)]
        return len(known) == len(module.producers) or module.producers.count(None) == len(module.producers)
    return True


def _rewrite_layer(layer: QuantizedLayer, target: OnnxForm) -> None:
    phases = phases_of(layer) if target == "onnxruntime" else None
    if phases is not None:
        rewrite_transposed(layer, phases)
        return
    axis = _weight_axis(layer)
    if target == "tensorrt":
        axis = None if runs_in_float(layer) else axis
        if layer.multiplier is not None and layer.stored_bias is not None:
            layer.keep(bias=(layer.stored_bias.double() * layer.multiplier.double()).float())
            layer.multiplier = None
    if axis is not None and layer.has_floats:
        _rewrite_float_weight(layer)
    elif target == "tensorrt" and axis is not None:
        # Values on the grid: TensorRT's QuantizeLinear gives the trained codes back.
        layer.keep(weight=layer.dequantized_weight(torch.float32))
    if axis is not None and not layer.has_floats:
        zero, dtype = layer.weight_zero_point, torch.int8 if target == "tensorrt" else layer.stored_weight.dtype
        scale = cast(Tensor, layer.weight_scale)
        zero = torch.zeros_like(scale, dtype=dtype) if zero is None else zero.to(dtype)
        if layer.has_groups:
            layer.keep(weight_scale=layer.linear_map.from_rows(scale))
            zero = layer.linear_map.from_rows(zero)
        if target == "tensorrt" and isinstance(layer, QuantizedTransposed):
            # One scale for all channels, or TensorRT refuses the layer.
            layer.keep(weight_scale=scale[0])
            zero, axis = zero[0], 0
        layer.weight_zero_point = zero
    layer.least_opset = PACKED_OPSET if axis is not None and layer.has_groups else 0
    # ONNX Runtime adds bias and products in integers in a Gemm, which takes matrices; behind a MatMul it adds floats.
    flattens = target == "onnxruntime" and isinstance(layer, nn.Linear) and layer.multiplier is not None
    layer.forward = partial(_layer_forward, layer, axis, flattens)  # type: ignore[method-assign]


def _rewrite_float_weight(layer: QuantizedLayer) -> None:
    """Make a weight of float codes a constant of 8-bit floats, in place; these hold smaller formats, too."""
    dtype = FLOAT_DTYPES.get(cast(QuantizedType, layer.types.weight).codes, torch.float8_e4m3fn)
    scale = cast(Tensor, layer.weight_scale)
    if layer.has_groups:
        scale = layer.linear_map.from_rows(scale)
    layer.keep(weight=layer.centred_weight().to(dtype), weight_scale=scale)
    layer.weight_zero_point = torch.zeros_like(scale).to(dtype)


def _weight_axis(layer: QuantizedLayer) -> int | None:
    """Return the axis that the weight's scales lie along, if ONNX's Q/DQ can express it; None: arithmetic is written.

    That is for float weights, for scales of grouped transposed convolutions, which run along two axes, and for codes of
    more than 8 bits. Zero points may differ between channels: ONNX Runtime's kernels take that (1.31, tried). Blocks
    lie along the input channels.
    """
    if layer.weight_scale is None or layer.stored_weight.dtype not in (torch.int8, torch.uint8):
        return None
    if isinstance(layer, QuantizedTransposed):
        return int(not layer.has_groups) if layer.groups == 1 else None
    return int(layer.has_groups)


def _layer_forward(
    layer: QuantizedLayer, axis: int | None, flattens: bool, input: Tensor, *computed: Tensor | None
) -> Tensor:
    scale, zero = layer.weight_scale, layer.weight_zero_point
    if axis is None:
        weight = layer.dequantized_weight(torch.float32)
    elif layer.stored_weight.dtype == torch.float32:
        weight = quantize_dequantize(layer.stored_weight, scale, zero, -128, 127, axis, False, "")
    else:
        group = cast(QuantizedType, layer.types.weight).group
        weight = dequantize(layer.stored_weight, scale, zero, axis, group)
    bias = layer.stored_bias
    if bias is not None and layer.multiplier is not None:
        bias = dequantize(bias, layer.multiplier, None, 0)
    x = layer.quantized_input(input)
    if flattens and x.dim() > 2:
        y = layer.finish(layer.linear_map(x.flatten(0, -2), weight, bias))
        return torch.unflatten(y, 0, x.shape[:-1])
    return layer.finish(layer.linear_map(x, weight, bias))
