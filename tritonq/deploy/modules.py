"""The layers of a converted model: integer weights, fixed quantizers, no training state.

Activations travel between modules as float tensors of values ``(code - zero_point) · scale``, so that any model
structure survives conversion. Each layer computes by the functions that quantization-aware layers use in eval mode, and
so gives the same bits: ``y = relu?((Σ (x_code - x_zero)(w_code - w_zero) + bias_code) · multiplier)``, then the output
quantizer. Scales and zero points of the weight are per out channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tritonq.deploy.quantizer import DeployedModule as DeployedModule
from tritonq.deploy.quantizer import Quantizer as Quantizer
from tritonq.deploy.values import check_shape, lazy_values, stored
from tritonq.functional.codes import can_use_codes
from tritonq.functional.conv2d import find_kernel, run_integer_layer
from tritonq.functional.integer import BYTE_BITS, IntegerAffine, largest_product, sum_bound
from tritonq.functional.integer_kernels import PackedLayer, pack, run_packed
from tritonq.functional.linear_map import LinearMap
from tritonq.functional.memo import Memo
from tritonq.grid import Grid
from tritonq.nn.conv import TakesOutputSize
from tritonq.nn.fusable import checked_ceiling, describe_relu
from tritonq.nn.own_input import QuantizedBehindClip, QuantizesInput
from tritonq.nn.qat import linear_map_of
from tritonq.quantized_type import QuantizedType
from tritonq.reference.activation import rectify
from tritonq.reference.float_rounding import floats_of_codes

# What a saved file holds per layer.
TENSOR_NAMES = (
    *("weight", "weight_scale", "weight_zero_point", "bias", "multiplier", "input_scale", "input_zero_point"),
)


@dataclass(frozen=True)
class CodeTypes:
    """The quantized types of a layer's weight and input.

    Attributes:
        weight: the weight's, per out channel or per group of input channels; None: the weight stayed in float.
        input: the input's; None: the layer computes in float, with the values of its weight.
    """

    weight: QuantizedType | None
    input: QuantizedType | None

    @property
    def bits(self) -> tuple[int, ...]:
        """Number of bits of the weight's codes, then of the input's, such as (4, 8); a type of None is left out."""
        return tuple(grid.bits for grid in (self.weight, self.input) if grid is not None)


class QuantizedLayer(QuantizesInput, QuantizedBehindClip, DeployedModule):
    """A converted convolution or linear layer, its weight in codes or in float; base of the classes with torch's names.

    ``y = relu?((Σ (x_code - x_zero)(w_code - w_zero) + bias_code) * multiplier)``, exact up to the multiplication, then
    the output quantizer. Without ``multiplier``: ``relu?(op(x, w) + bias)`` in float, with w the weight's values. That
    is so if the grid of x or w is unknown, off or not of integers, that of x is per channel, or w has groups.

    Args:
        geometry: arguments of the float layer's constructor without ``bias``, by name.
        types: the quantized types of weight and input.
        tensors: by their names in the state dict, such as ``"weight"`` for its codes; not copied. None: it is absent.
        ceiling: upper bound of the ReLU that follows, infinity for a plain one; None without a ReLU.
        output: the output's :class:`Quantizer`; None: an Identity.

    Raises:
        ValueError: tensors whose shapes don't fit the geometry, or a ceiling that is not positive.

    Attributes:
        weight: the values of the codes in the model's dtype, shaped as the float weight, computed when something reads
            them.
        stored_weight: the codes, in the smallest integer dtype that holds them (float32 values where ``types.weight``
            is None); in the state dict called ``weight``.
        weight_scale: float32 (out,); where n input channels share one, (out, in/groups/n, ...); None: a float weight.
        weight_zero_point: int32, as ``weight_scale``, or None where all are 0.
        bias: float32 values, or None.
        stored_bias: int32, one step is ``multiplier``; float without ``multiplier``; or None. In the state dict called
            ``bias``.
        multiplier: float32 (out,), input scale times weight scale; None: the layer computes in float.
        input_scale: float32 (1,), or None.
        input_zero_point: int32 (1,), or None.
        types: the quantized types of weight and input.
        ceiling: upper bound of the ReLU that follows, infinity for a plain one; None without a ReLU.
        following: the module of another function, such as SiLU, between layer and output quantizer, or None.
        activation_post_process: the output's :class:`Quantizer`, or an Identity.
        target: engine that the model was prepared for, a key of :data:`tritonq.targets.TARGETS`; None: unknown.
    """

    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    multiplier: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    activation_post_process: nn.Module
    target: str | None = None
    tensor_names = TENSOR_NAMES
    parameter_names = ("weight", "weight_scale", "bias")
    zero_points: ClassVar[dict[str, tuple[str, str]]] = {"weight_zero_point": ("weight", "weight_scale")}
    # Whether the layer was a function in a forward, which may go on giving it a weight.
    takes_weight: bool = False

    # The float layer that gives geometry and arithmetic, and the names of its constructor's arguments.
    float_type: ClassVar[type[nn.Module]]
    geometry_names: ClassVar[tuple[str, ...]] = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    )

    def __init__(
        self,
        geometry: dict[str, Any],
        types: CodeTypes,
        tensors: dict[str, Tensor | None],
        ceiling: float | None = None,
        output: nn.Module | None = None,
    ) -> None:
        # The float constructor sets strides, paddings and the like, which users' code may read; no memory is taken.
        self.float_type.__init__(self, **geometry, bias=False, device="meta")
        check_shape("weight", tensors.get("weight"), tuple(self.stored_weight.shape))
        rows = tuple(self.linear_map.to_rows(self.stored_weight).shape)
        self.types = types
        per_scale = cast(QuantizedType, types.weight).granularity.scale_shape(rows) if self.has_groups else rows[:1]
        for name in ("weight_scale", "weight_zero_point", "bias", "multiplier"):
            check_shape(name, tensors.get(name), per_scale if name.startswith("weight") else rows[:1])
        del self._parameters["weight"], self._parameters["bias"]
        self.ceiling = checked_ceiling(ceiling)
        self._packed: Memo[PackedLayer | None] = Memo()
        self.keep(**{name: tensors.get(name) for name in TENSOR_NAMES})
        self.activation_post_process = nn.Identity() if output is None else output
        self.read_tensors()
        self.eval()

    def read_tensors(self) -> None:
        """Set ``_sum_bound``, an upper bound of ``|Σ …|`` (0.0 for a layer in float); called after each load."""
        self._sum_bound = 0.0
        if self.input_zero_point is not None and self.types.input is not None:
            rows = self.linear_map.to_rows(self.centred_weight())
            self._sum_bound = sum_bound(rows, self.input_zero_point, self.types.input)

    @property
    def has_groups(self) -> bool:
        """Whether the weight has a scale per group of input channels."""
        return self.types.weight is not None and self.types.weight.group is not None

    @property
    def has_floats(self) -> bool:
        """Whether the weight has codes of a float format, such as FP8; False for a weight that stayed in float."""
        return self.types.weight is not None and self.types.weight.float_format is not None

    @property
    def geometry(self) -> dict[str, Any]:
        """Arguments of the float layer's constructor by name, without ``bias``; a Conv2d's stride 1 is (1, 1)."""
        return {name: getattr(self, name) for name in self.geometry_names}

    @property
    def linear_map(self) -> LinearMap:
        """The layer's convolution or matrix product with its geometry, to be called with input, weight and bias."""
        return linear_map_of(self)

    @property
    def stored_weight(self) -> Tensor:
        """The tensor that the state dict has as ``weight``: integer codes, or the values of a float weight."""
        return cast(Tensor, stored(self, "weight"))

    @property
    def stored_bias(self) -> Tensor | None:
        """The tensor that the state dict has as ``bias``: int32 (one step is ``multiplier``), or floats; or None."""
        return stored(self, "bias")

    def _float_weight(self) -> Tensor:
        codes = self.stored_weight
        if codes.is_floating_point():
            return codes
        return lazy_values(codes, partial(self.dequantized_weight, self.float_dtype), self.float_dtype)

    def _float_bias(self) -> Tensor | None:
        codes = self.stored_bias
        if codes is None or self.multiplier is None:
            return codes
        return (codes.float() * self.multiplier).to(self.float_dtype)

    # Properties, which mypy must take for the attributes that torch's classes have.
    weight: Tensor = property(_float_weight)  # type: ignore[assignment]
    bias: Tensor | None = property(_float_bias)  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a tensor in place of weight or bias codes that has another dtype raises AttributeError."""
        if name in ("weight", "bias") and "types" in vars(self) and isinstance(value, Tensor):
            held = self.stored_weight if name == "weight" else self.stored_bias
            if self.weight_scale is not None and (held is None or held.dtype != value.dtype):
                raise AttributeError(
                    f"the {name} of a converted layer is fixed: change, merge or fuse the float model, then prepare "
                    "and convert that"
                )
        super().__setattr__(name, value)

    def along_weight(self, values: Tensor) -> Tensor:
        """Return values, one per out channel or group (such as scales), shaped to broadcast against the weight.

        ``values`` is (out,), or with groups shaped as ``weight_scale``: each is repeated for all elements of its group.
        """
        if not self.has_groups:
            return self.along_out_channels(values)
        group = cast(int, cast(QuantizedType, self.types.weight).group)
        return self.linear_map.from_rows(values.repeat_interleave(group, 1))

    def along_out_channels(self, values: Tensor) -> Tensor:
        """Return ``values`` (out,), one per out channel, viewed as (out, 1, ...) to broadcast against the weight."""
        return values.view(-1, *[1] * (self.stored_weight.dim() - 1))

    def centred_weight(self) -> Tensor:
        """Return weight codes minus zero points, int32; without zero points ``stored_weight`` itself, in its dtype.

        Of a float format the numbers that codes stand for, before the scale, float32; a float weight is not changed.
        """
        number = None if self.types.weight is None else self.types.weight.float_format
        if number is not None:
            return floats_of_codes(self.stored_weight, number)
        if self.weight_zero_point is None:
            return self.stored_weight
        return self.stored_weight.to(torch.int32) - self.along_weight(self.weight_zero_point)

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        """Return :meth:`centred_weight` times scale, computed in float32, or a float weight; in ``dtype``."""
        if self.weight_scale is None:
            return self.stored_weight.to(dtype)
        return (self.centred_weight().float() * self.along_weight(self.weight_scale)).to(dtype)

    def integer_layer(self) -> IntegerAffine | None:
        """Return the layer as integer operators take it: weight codes minus zero points, bias codes, scales, bounds.

        None if ``multiplier`` is None: the layer computes in float.
        """
        if self.multiplier is None:
            return None
        return IntegerAffine(
            weight=self.centred_weight(),
            bias=self.stored_bias,
            multiplier=self.multiplier,
            input_scale=cast(Tensor, self.input_scale),
            find_sum_bound=lambda: self._sum_bound,
            weight_scale=cast(Tensor, self.weight_scale),
            weight_zero_point=self.weight_zero_point,
            has_8_bit_codes=max(self.types.bits) <= BYTE_BITS,
            largest_product=largest_product(
                (cast(QuantizedType, self.types.input), self.input_zero_point),
                (cast(QuantizedType, self.types.weight), self.weight_zero_point),
            ),
        )

    def forward(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Return the layer's result, shaped as the float layer's, as quantization-aware layers in eval mode compute it.

        ``input`` has values of the input's grid, unless a child ``input_fake_quant`` rounds it. ``weight`` and ``bias``
        are ignored: a forward that computed them may go on passing them.
        """
        x = self.quantized_input(input)
        y = self._run_packed(x) if self._buffers["multiplier"] is not None and can_use_codes(x) else None
        if y is not None:
            return y
        layer, quantizer = self.integer_layer(), self.activation_post_process
        kernel = find_kernel(x, self.stored_weight, self.linear_map, layer)
        if kernel is None:
            return self.run_operators(x, layer)
        fused = quantizer.fused_grid() if isinstance(quantizer, Quantizer) and self.following is None else None
        if layer is None:
            y = kernel(x, self.dequantized_weight(x.dtype), self._bias_as(x.dtype), self.ceiling, fused)
        else:
            y = kernel.integers(x, layer, self.output_grid(), self.ceiling, fused)
        return y if fused is not None else self.finish(y, relu_done=True)

    def _run_packed(self, x: Tensor) -> Tensor | None:
        """Return :meth:`forward`'s result by torch's integer kernels; None if they can't run this layer on ``x``."""
        quantizer = cast(nn.Module, self._modules["activation_post_process"])
        if quantizer._forward_pre_hooks:
            return None
        behind = self.quantizer_behind_clip
        further = () if behind is None else behind._buffers.values()
        held = (*self._parameters.values(), *self._buffers.values(), *quantizer._buffers.values(), *further)
        geometry = [self.__dict__[name] for name in self.geometry_names]
        key = (self.ceiling, self.types, quantizer, behind, len(self._modules), geometry)
        packed = self._packed.get(held, self._pack, key)
        y = None if packed is None else run_packed(x, packed)
        if y is None or packed is None:
            return None
        if packed.output_grid is None:
            return self.finish(y)
        # Who listens to the quantizer's results is told.
        return cast(Tensor, quantizer(y)) if quantizer._forward_hooks else y

    def _pack(self) -> PackedLayer | None:
        layer, qtype = self.integer_layer(), self.types.input
        if layer is None or qtype is None:
            return None
        source = Grid(layer.input_scale, self.input_zero_point, qtype)
        return pack(layer, self.linear_map, source, self.output_grid(), self.ceiling)

    def run_operators(self, x: Tensor, layer: IntegerAffine | None) -> Tensor:
        """Return what ``forward`` returns, by PyTorch's operators; ``x`` was rounded by ``input_fake_quant``, if any.

        In integers by ``layer``, the result of :meth:`integer_layer`; in float if that is None.
        """
        if layer is None:
            return self.finish(self.linear_map(x, self.dequantized_weight(x.dtype), self._bias_as(x.dtype)))
        return self.finish(run_integer_layer(x, layer, self.linear_map, self.output_grid(), None))

    def _bias_as(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.stored_bias is None else self.stored_bias.to(dtype)

    @property
    def following(self) -> nn.Module | None:
        """The child ``activation``, a function such as SiLU between layer and output quantizer; None without."""
        return self._modules.get("activation")

    def finish(self, y: Tensor, relu_done: bool = False) -> Tensor:
        """Return ``y``, values of the result with bias, after the ReLU, ``following`` and the output quantizer.

        With ``relu_done`` the ReLU was applied already.
        """
        if not relu_done:
            y = rectify(y, self.ceiling)
        if self.following is not None:
            y = self.following(y)
        return cast(Tensor, self.activation_post_process(y))

    def output_grid(self) -> Grid | None:
        """Return the grid of :attr:`output_quantizer`; None if that is None."""
        quantizer = self.output_quantizer
        return None if quantizer is None else quantizer.grid()

    @property
    def output_quantizer(self) -> Quantizer | None:
        """The quantizer that rounds the whole output to one grid: the layer's own, or that of a clip module behind it.

        None if there is neither, if it is per channel or of a float format, or if there is a module in ``following``.
        """
        quantizer = self.last_quantizer(self.activation_post_process)
        if self.following is not None or not isinstance(quantizer, Quantizer) or quantizer.qtype.axis is not None:
            return None
        return quantizer

    def extra_repr(self) -> str:
        """Return the text for ``repr``, torch's, then "relu, weight=torch.int8, arithmetic=integers" (or float)."""
        arithmetic = "float" if self.multiplier is None else "integers"
        relu = "" if self.ceiling is None else f", {describe_relu(self.ceiling)}"
        return f"{super().extra_repr()}{relu}, weight={self.stored_weight.dtype}, arithmetic={arithmetic}"


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """``nn.Conv1d`` of a converted model: a :class:`QuantizedLayer`, which has the formula."""

    float_type = nn.Conv1d


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """``nn.Conv2d`` of a converted model: a :class:`QuantizedLayer`, which has the formula."""

    float_type = nn.Conv2d


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """``nn.Conv3d`` of a converted model: a :class:`QuantizedLayer`, which has the formula."""

    float_type = nn.Conv3d


class QuantizedTransposed(TakesOutputSize, QuantizedLayer):
    """A transposed :class:`QuantizedLayer`: weight (in, out/groups, ...), calls take ``output_size`` as in torch."""

    geometry_names = (*QuantizedLayer.geometry_names, "output_padding")
    in_channels: int
    groups: int

    def along_out_channels(self, values: Tensor) -> Tensor:
        """Return ``values`` (out,), one per out channel, as (in, out/groups, 1, ...) to broadcast against the weight.

        At ``[i, j]``, with i an input channel of group g, is the value of out channel ``g · out/groups + j``.
        """
        columns = values.view(self.groups, 1, -1).expand(-1, self.in_channels // self.groups, -1)
        return columns.reshape(self.in_channels, -1, *[1] * (self.stored_weight.dim() - 2))


class QuantizedConvTranspose2d(QuantizedTransposed, nn.ConvTranspose2d):  # type: ignore[misc]
    """``nn.ConvTranspose2d`` of a converted model: a :class:`QuantizedTransposed`."""

    float_type = nn.ConvTranspose2d


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` of a converted model: a :class:`QuantizedLayer`, which has the formula."""

    float_type = nn.Linear
    geometry_names = ("in_features", "out_features")
