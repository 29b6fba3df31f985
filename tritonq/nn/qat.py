"""What every quantization-aware layer shares: its quantizers, and the arithmetic of eval mode."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tritonq.fake_quantize import FakeQuantizeBase
from tritonq.functional.conv2d import ConvKernel, find_kernel
from tritonq.functional.integer import IntegerAffine, integer_affine, to_integers
from tritonq.functional.linear_map import Convolution, LinearMap
from tritonq.grid import Grid
from tritonq.nn.fusable import describe_relu, fixed_grid
from tritonq.nn.reference import Reference, ReferringModule
from tritonq.qconfig import QConfig
from tritonq.reference.activation import rectify


class QATLayer(ReferringModule):
    """A linear operation with a fake-quantized weight and a fake-quantized output.

    Attributes:
        weight_fake_quant: quantizer of the weight (of the folded weight where there is a BatchNorm).
        activation_post_process: quantizer of the output, after ReLU where there is one.
        qconfig: where both came from.
        ceiling: upper bound of the ReLU between the operation and its quantizer: infinity for a plain one, 6 for ReLU6;
            None without a ReLU.
    """

    weight: Tensor
    bias: Tensor | None
    qconfig: QConfig
    weight_fake_quant: nn.Module
    activation_post_process: nn.Module
    ceiling: float | None = None

    _references = ("_input_quantizer",)
    # Axis of the output that out channels run along; counted from the end, where a batch axis may be missing.
    _output_axis: ClassVar[int] = 1

    def attach_quantizers(self, qconfig: QConfig | None, out_channels: int) -> None:
        """Create the quantizers of ``qconfig`` with buffers of their final shape.

        Raises:
            TypeError: no QConfig.
            ValueError: a weight quantizer whose channel axis is not the layer's out-channel axis.
        """
        if not isinstance(qconfig, QConfig):
            raise TypeError(f"{type(self).__name__} needs qconfig=QConfig(...), got {qconfig!r}")
        self.qconfig = qconfig
        self.weight_fake_quant = qconfig.weight()
        self.activation_post_process = qconfig.activation()
        self._input_quantizer: Reference[FakeQuantizeBase] = Reference()
        axis = _axis(self.weight_fake_quant)
        if axis is not None:
            if axis != 0:
                raise ValueError(
                    f"the weight quantizer of {type(self).__name__} keeps one scale per index of axis {axis}; "
                    "weight quantizers use ch_axis=0, the out channels, here for transposed convolutions too"
                )
            self.weight_fake_quant.allocate(out_channels)  # type: ignore[operator]
        if self.weight.device.type != "meta":
            self.move_quantizers(self.weight.device)

    def move_quantizers(self, device: torch.device) -> None:
        """Put the quantizers' buffers on ``device``."""
        self.weight_fake_quant.to(device)
        self.activation_post_process.to(device)

    def set_input_quantizer(self, quantizer: FakeQuantizeBase | None) -> None:
        """Say which quantizer's grid this layer's input lies on (None: unknown).

        With it, eval mode computes in exact integers with an int32 bias, as the deployed layer does.
        """
        self._input_quantizer = Reference(quantizer)

    def extra_repr(self) -> str:
        """Geometry, and the ReLU where the class's name does not say all of it."""
        text = super().extra_repr()
        return text if self.ceiling in (None, math.inf) else f"{text}, {describe_relu(self.ceiling)}"

    @property
    def input_quantizer(self) -> FakeQuantizeBase | None:
        """The quantizer whose grid this layer's input lies on, where known."""
        return self._input_quantizer.module

    @abstractmethod
    def linear_op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The float convolution or product."""

    def folded_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that eval mode and deployment use: the float ones, with any BatchNorm folded in."""
        return self.weight, self.bias

    def to_rows(self, weight: Tensor) -> Tensor:
        """``weight`` with its out channels on axis 0, as quantizers see it."""
        return weight

    def from_rows(self, rows: Tensor) -> Tensor:
        """Inverse of :meth:`to_rows`."""
        return rows

    def quantized_weight(self, weight: Tensor) -> Tensor:
        """``weight`` after its fake quantizer, which observes it while training."""
        return self.from_rows(self.weight_fake_quant(self.to_rows(weight)))

    @abstractmethod
    def as_linear_map(self, x: Tensor) -> tuple[Tensor, LinearMap]:
        """The input, padded where the map itself cannot, and the layer without weight and bias."""
        raise NotImplementedError

    def plain_conv2d(self) -> Convolution | None:
        """The layer as a 2-d convolution that a kernel could run, or None."""
        return None

    def linear_relu(self, x: Tensor, weight: Tensor, bias: Tensor | None, ceiling: float | None) -> Tensor:
        """``relu?(op(x, weight) + bias)``, differentiable, by the kernel where this GPU's table prefers it."""
        kernel = find_kernel(x, weight, self.plain_conv2d())
        if kernel is not None:
            return kernel(x, weight, bias, ceiling)
        y = self.linear_op(x, weight, bias)
        return rectify(y, ceiling)

    def eval_output(self, x: Tensor, weight: Tensor, bias: Tensor | None, ceiling: float | None) -> Tensor:
        """``FQ_a(relu?(op(x, FQ_w(weight)) + bias))``: what eval mode computes, in one kernel where that is faster."""
        if torch.compiler.is_compiling():
            y = self._traced_affine(x, weight, bias)
            return cast(Tensor, self.activation_post_process(rectify(y, ceiling)))
        layer = self.integer_layer(weight, bias)
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if layer is None and needs_grad:
            y = self.linear_relu(x, self.quantized_weight(weight), bias, ceiling)
            return cast(Tensor, self.activation_post_process(y))
        kernel = find_kernel(x, weight, self.plain_conv2d(), layer)
        if kernel is None or needs_grad:
            y = self._affine(x, weight, bias, layer, kernel)
            return cast(Tensor, self.activation_post_process(rectify(y, ceiling)))
        quantizer = fixed_grid(self.activation_post_process)
        if layer is None:
            y = kernel(x, self.quantized_weight(weight), bias, ceiling, quantizer)
        else:
            y = kernel.integers(x, layer, self._output_grid(), ceiling, quantizer)
        return y if quantizer is not None else cast(Tensor, self.activation_post_process(y))

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with ``weight`` fake-quantized: in float while training, in exact integers in eval mode."""
        if torch.compiler.is_compiling() and not self.training:
            return self._traced_affine(x, weight, bias)
        layer = None if self.training else self.integer_layer(weight, bias)
        kernel = None if layer is None else find_kernel(x, weight, self.plain_conv2d(), layer)
        return self._affine(x, weight, bias, layer, kernel)

    def _affine(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, layer: IntegerAffine | None, kernel: ConvKernel | None
    ) -> Tensor:
        if layer is None:
            return self.linear_op(x, self.quantized_weight(weight), bias)
        with torch.no_grad():
            if kernel is None:
                exact = integer_affine(x, layer, self.linear_op, self._output_axis, self._output_grid()).to(x.dtype)
            else:
                exact = kernel.integers(x, layer, self._output_grid())
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            surrogate = self.linear_op(x, self.quantized_weight(weight), bias)
            return with_gradient_of(exact, surrogate)
        return exact

    def _traced_affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """:meth:`_affine` in eval mode for ``torch.compile``: whether integers are computed is asked on the device."""
        source, quantizer = self.input_quantizer, self.weight_fake_quant
        if source is None or source.qtype.axis is not None or not isinstance(quantizer, FakeQuantizeBase):
            return self.linear_op(x, self.quantized_weight(weight), bias)
        from tritonq.functional.traced import eval_mode

        output = self._output_quantizer()
        padded, op = self.as_linear_map(x)
        grids = (source.grid(), quantizer.grid(), None if output is None else output.grid())
        exact = eval_mode.affine(padded, weight, bias, op, self._output_axis, *grids)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            # The compiler drops the surrogate's own value.
            return with_gradient_of(exact, self.linear_op(x, self.quantized_weight(weight), bias))
        return exact

    def _output_quantizer(self) -> FakeQuantizeBase | None:
        """The quantizer that takes all of the output to one grid, or None."""
        quantizer = self.activation_post_process
        return quantizer if isinstance(quantizer, FakeQuantizeBase) and quantizer.qtype.axis is None else None

    def _output_grid(self) -> Grid | None:
        """The one grid that the output goes onto, or None where there is none, or it is switched off."""
        quantizer = self._output_quantizer()
        if quantizer is None or not quantizer.is_enabled_on_host():
            return None
        return quantizer.grid()

    @torch.no_grad()
    def integer_layer(self, weight: Tensor, bias: Tensor | None) -> IntegerAffine | None:
        """This layer in integers, or None where input grid or weight grid are unknown or switched off."""
        source, quantizer = self.input_quantizer, self.weight_fake_quant
        if source is None or source.qtype.axis is not None or not source.is_enabled_on_host():
            return None
        if not isinstance(quantizer, FakeQuantizeBase) or not quantizer.is_enabled_on_host():
            return None
        return to_integers(weight, bias, self, source.grid(), quantizer.grid())


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value``, with the gradient of ``surrogate``."""
    return _WithGradientOf.apply(value, surrogate)  # type: ignore[no-untyped-call,no-any-return]


class _WithGradientOf(torch.autograd.Function):
    """The value of the first argument, the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        return None, dy


def _axis(quantizer: nn.Module) -> int | None:
    qtype = getattr(quantizer, "qtype", None)
    return None if qtype is None else qtype.axis
