"""Quantizers of a model that is traced for an ONNX file: each traces to one operator.

Their codes are those of the file: the trained ones, or for ONNX Runtime uint8, counted from the smallest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tritonq.deploy.modules import Quantizer
from tritonq.deploy.onnx_floats import FLOAT_DTYPES, FLOATS_OPSET
from tritonq.deploy.onnx_ops import quantize_dequantize, round_half_away
from tritonq.deploy.onnx_packed import PACKED_OPSET
from tritonq.deploy.quantizer import DeployedModule
from tritonq.granularity import Granularity
from tritonq.nn.unary import UnaryLayer
from tritonq.reference.fake_quant import quantize


class TracedQuantizer(nn.Module):
    """A quantizer that traces to one operator, which the file has as QuantizeLinear and DequantizeLinear.

    Args:
        source: the converted model's quantizer, which gives scale, axis and rounding.
        name: name of the quantizer, under which the file lists its codes; empty: they are not listed.
        zero_point: one element, or one per channel; the codes have its dtype. float32: the file computes by
            floating-point operators, without QuantizeLinear.
        quant_min: smallest code.
        quant_max: largest code.
        exact: whether the quotient is computed as in training, before a QuantizeLinear of scale 1. Per channel it is
            only by floating-point operators. Otherwise the operator divides, and ties round to the even code, whatever
            the rounding of ``source``.

    Attributes:
        clamp: smallest and largest value, to which values are limited before they are rounded; None, as at first: no
            limit. The plain form sets it where the codes are fewer than those of their dtype.
    """

    scale: Tensor
    zero_point: Tensor
    inverse: Tensor

    __call__: Callable[..., Tensor]

    def __init__(
        self, source: Quantizer, name: str, zero_point: Tensor, quant_min: int, quant_max: int, exact: bool = False
    ) -> None:
        super().__init__()
        self.name = name
        self.is_float = zero_point.is_floating_point()
        self.exact = exact and (source.qtype.axis is None or self.is_float)
        self.rounding = source.qtype.rounding
        self.quant_min, self.quant_max = quant_min, quant_max
        self.axis = 0 if source.qtype.axis is None else source.qtype.axis
        # ONNX tells per tensor from per channel by the number of dimensions.
        shape = () if source.qtype.axis is None else (-1,)
        self.register_buffer("scale", source.scale.reshape(shape))
        self.register_buffer("zero_point", zero_point.reshape(shape))
        # One axis, not none: ONNX Runtime would multiply it into the weights of a float convolution before, and then
        # quantize these.
        self.register_buffer("inverse", self.scale.reciprocal().reshape(-1))
        self.clamp: tuple[float, float] | None = None

    def forward(self, x: Tensor, in_steps: bool = False) -> Tensor:
        """Return ``(clamp(round(x / s) + z, quant_min, quant_max) - z) · s``, float32; limited by :attr:`clamp` before.

        With ``in_steps`` ``x`` is divided by the scale already, and ties round to even; there must then be one scale,
        and no :attr:`clamp`, which is in values.
        """
        if self.clamp is not None:
            x = x.clamp(*self.clamp)
        scale, zero_point, inverse = self.scale, self.zero_point, self.inverse if x.dim() else self.inverse.reshape(())
        if self.is_float and scale.dim():
            # Operators broadcast them; QuantizeLinear is told the axis.
            scale, zero_point, inverse = (
                Granularity(self.axis).align(t, x.dim()) for t in (scale, zero_point, inverse)
            )
        if self.exact and not in_steps:
            x = x * inverse if self.rounding == "half_even" else round_half_away(x / scale)
        bounds, divided = (self.quant_min, self.quant_max), self.exact or in_steps
        y: Tensor = quantize_dequantize(x, scale, zero_point, *bounds, self.axis, divided, self.name)
        return y


def float_quantizer(source: Quantizer, name: str) -> TracedQuantizer:
    """Return a traced quantizer that the file has as floating-point operators, which give the trained codes and values.

    It holds what an engine's integers can't: there is no QuantizeLinear, and what reads the values computes in float.
    ``name`` is the name of ``source``.
    """
    bounds = source.qtype.quant_min, source.qtype.quant_max
    return TracedQuantizer(source, name, source.zero_point.float(), *bounds, exact=True)


def uint8_quantizer(
    source: Quantizer,
    name: str,
    bounds: tuple[float, float] | None = None,
    *,
    exact: bool = False,
    from_zero: bool | None = None,
) -> TracedQuantizer:
    """Return a traced quantizer with uint8 codes, counted from 0, for ONNX Runtime.

    If there is a grid per channel, it is one of float arithmetic with the trained codes (:func:`float_quantizer`).
    Code 0 of the file is the smallest code of the type of ``source``. Behind a ReLU, if the type fixes the zero point,
    it is the code of the value 0, as in the converted model: the roundings of a sum depend on where codes begin.

    Args:
        source: the converted model's quantizer.
        name: its name in the model.
        bounds: smallest and largest value, of a ReLU or clip before it, which the codes are limited to, for a quantizer
            with one scale; None: no limit.
        exact: whether the quotient is computed before QuantizeLinear, as in training; False: QuantizeLinear divides.
            Per channel it changes nothing.
        from_zero: whether the file's code 0 is that of the lower bound, for types that fix the zero point; None: if
            that bound is 0. Without ``bounds`` it changes nothing.

    Raises:
        ValueError: a code of the file would be above 255.
    """
    if source.qtype.axis is not None:  # integer kernels take one grid per tensor
        return float_quantizer(source, name)
    grid = source.qtype
    lowest, highest = (grid.quant_min, grid.quant_max) if bounds is None else end_codes(source, bounds)
    is_relu = bounds is not None and bounds[0] == 0 if from_zero is None else from_zero
    start = lowest if is_relu and grid.fixed_zero_point is not None else grid.quant_min
    if highest - start > 255:
        raise ValueError(
            f"the quantizer {name!r} has the codes {grid.quant_min}..{grid.quant_max}; ONNX Runtime's integer kernels "
            'take at most 8 bits: export with target="qdq", whose pairs hold 16'
        )
    zero_point = (source.zero_point - start).to(torch.uint8)
    return TracedQuantizer(source, name, zero_point, lowest - start, highest - start, exact)


def plain_quantizer(source: Quantizer, name: str) -> TracedQuantizer:
    """Return a traced quantizer that is a QuantizeLinear and a DequantizeLinear of one grid, with nothing between.

    Codes are those that were trained. A range narrower than its dtype becomes a clamp before QuantizeLinear.

    Args:
        source: the converted model's quantizer.
        name: its name in the model.

    Raises:
        ValueError: codes that fit none of int8, uint8, int16 and uint16, or that are, per channel, fewer than their
            dtype's.
    """
    low, high = source.qtype.quant_min, source.qtype.quant_max
    dtype = _plain_dtype(low, high)
    if dtype is None:
        raise ValueError(
            f"the quantizer {name!r} has the codes {low}..{high}; the plain form holds int8, uint8, int16 and uint16"
        )
    limits = torch.iinfo(dtype)
    traced = TracedQuantizer(source, name, source.zero_point.to(dtype), limits.min, limits.max)
    if (low, high) != (limits.min, limits.max):
        if source.qtype.axis is not None:
            raise ValueError(f"the plain form has no clamp per channel, which the quantizer {name!r} needs")
        scale, zero = float(source.scale), int(source.zero_point)
        traced.clamp = ((low - zero) * scale, (high - zero) * scale)
    return traced


def _plain_dtype(low: int, high: int) -> torch.dtype | None:
    """Return the smallest dtype of QuantizeLinear that holds the codes ``low .. high``; None if none does."""
    dtypes = (torch.int8, torch.int16) if low < 0 else (torch.uint8, torch.uint16)
    limits = ((dtype, torch.iinfo(dtype)) for dtype in dtypes)
    return next((dtype for dtype, limit in limits if limit.min <= low and high <= limit.max), None)


def grids_of(layer: UnaryLayer) -> tuple[Quantizer, Quantizer] | None:
    """Return the quantizers of a layer's input and output.

    None if one is missing, has a scale per channel or rounds to a float format: the layer computes in float.
    """
    source, output = layer.input_quantizer, layer.output_quantizer
    if not isinstance(source, Quantizer) or not isinstance(output, Quantizer):
        return None
    return None if source.qtype.axis is not None or output.qtype.axis is not None else (source, output)


def least_opset(model: nn.Module) -> int:
    """Return the oldest opset with all that a model of :func:`onnx_form` needs: 21 or 19; 0 if any will do.

    21 brought quantizers of 16 bits and weights in groups, 19 8-bit floats. Weights in groups count where the file has
    their codes (:attr:`DeployedModule.least_opset`), not where it has their values.
    """
    modules = list(model.modules())
    quantizers = (module for module in modules if isinstance(module, TracedQuantizer))
    wide = any(quantizer.zero_point.dtype in (torch.int16, torch.uint16) for quantizer in quantizers)
    held = (tensor for module in modules for tensor in module._buffers.values() if tensor is not None)
    has_floats = any(tensor.dtype in FLOAT_DTYPES.values() for tensor in held)
    of_modules = (module.least_opset for module in modules if isinstance(module, DeployedModule))
    return max(PACKED_OPSET if wide else 0, FLOATS_OPSET if has_floats else 0, *of_modules, 0)


def quantize_twice(layer: nn.Module) -> None:
    """Give a layer a child ``first_quantizer``, a copy of its output quantizer whose codes have no name in the file.

    The caller makes the layer's forward run both, with operations that move values between them. ONNX Runtime computes
    a layer in integers if a quantizer follows directly. The second quantizer is the one that the layer had, still its
    ``activation_post_process``. It changes no code, and its codes have the trained shape. Its
    :attr:`TracedQuantizer.exact` becomes False; that of the copy is what it was.

    Raises:
        TypeError: the layer has no traced quantizer.
    """
    output = layer.activation_post_process
    if not isinstance(output, TracedQuantizer):
        raise TypeError(f"a layer that is quantized twice has a traced quantizer, got {type(output).__name__}")
    first = copy.deepcopy(output)
    first.name, output.exact = "", False
    layer.add_module("first_quantizer", first)


def end_codes(quantizer: Quantizer, bounds: tuple[float, float]) -> tuple[int, int]:
    """Return the trained codes of two values, ``bounds``, on a quantizer's grid per tensor; those beyond it saturate.

    The codes lie in ``quant_min..quant_max`` of the converted model's quantizer, not in the range that the file has.
    """
    codes = quantize(torch.tensor(bounds, device=quantizer.scale.device), quantizer.grid())
    return int(codes[0]), int(codes[1])
