"""Convolutions by Triton kernel: of codes, and of values if this GPU's table says that the kernel beats torch's.

The *table* (`tritonq.kernels.conv2d.tuned_tile`) has for each class of convolution that was timed on a GPU the launch
size (*tile*) of the kernel, or ``"torch"`` if torch's was faster. Torch's own convolution of codes on GPUs is one in
float64, so codes take the kernel if the table has no entry, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonq.backend import select
from tritonq.functional.differentiable_once import differentiable_once
from tritonq.functional.integer import IntegerAffine, centred_codes, integer_affine
from tritonq.functional.linear_map import Convolution, LinearMap
from tritonq.grid import Grid
from tritonq.reference.activation import rectify_backward

# A grid's second axis, on which groups lie, takes as many programs.
_MOST_GROUPS = 65535


@dataclass(frozen=True)
class ConvKernel:
    """The kernel that runs one layer: a convolution or matrix product as a 2-d convolution.

    Attributes:
        op: the layer's convolution or matrix product, without weight and bias.
        conv: ``op`` as a 2-d convolution, of input and weight as ``op.images`` reshapes them.
        tile: launch size of the kernel, a `tritonq.kernels.conv_tile.ConvTile`; None: the default size.
    """

    op: LinearMap
    conv: Convolution
    tile: Any

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ceiling: float | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """Return ``FQ(relu?(conv(x, weight) + bias))`` of a 2-d convolution; differentiable if ``grid`` is None.

        Args:
            x: (n, c, h, w).
            weight: (out, c/groups, kh, kw), quantized already.
            bias: (out,), or None.
            ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.
            grid: of the output's quantizer; None: no fake quantization.

        Raises:
            TypeError: input, weight and bias differ in dtype.

        Source: docs/integers.md, "Linear layers"; the gradients are torch's.
        """
        if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
            got = [str(t.dtype) for t in (x, weight, bias) if t is not None]
            raise TypeError(f"input, weight and bias must have one dtype, got {', '.join(got)}")
        if grid is not None:
            return self._run(x, weight, bias, ceiling, grid)
        y: Tensor = _FoldedConv2d.apply(x, weight, bias, self, ceiling)  # type: ignore[no-untyped-call]
        return y

    def integers(
        self,
        x: Tensor,
        layer: IntegerAffine,
        output: Grid | None,
        ceiling: float | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """Compute a layer in integers, then ReLU and fake quantization, in one kernel: ``FQ(relu?(v))``.

        ``v = fl(Σ (x_code - x_zero) (w_code - w_zero) + bias) · multiplier``, or with ``output``, of scale s,
        ``round(fl(Σ … + bias) · fl(multiplier / s)) · s``; fl rounds to float32. These are the bits of
        :func:`tritonq.functional.integer.integer_affine`.

        Args:
            x: float tensor of values on the layer's input grid.
            layer: the integers; codes of input and weight have up to 8 bits.
            output: grid that sums are rounded to before the ReLU, without clipping, per tensor; None: no rounding.
            ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.
            grid: of FQ, which rounds and clips, per tensor; None: no FQ, and values beyond ``output`` stay.

        Returns:
            The layer's result in ``x``'s dtype; without gradient.
        """
        from tritonq.kernels.conv2d import integer_conv2d

        multiplier = layer.multiplier if output is None else layer.multiplier / output.scale
        codes, weight = self.op.images(centred_codes(x, layer.input_scale), layer.weight)
        result: Tensor = integer_conv2d(
            codes,
            weight,
            layer.bias,
            multiplier,
            output,
            x.dtype,
            *self._geometry,
            ceiling,
            grid,
            tile=self.tile,
            largest_product=layer.largest_product,
        )
        return self.op.from_images(result, x)

    @property
    def _geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        return self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None, ceiling: float | None, grid: Grid | None) -> Tensor:
        from tritonq.kernels.conv2d import conv2d

        y: Tensor = conv2d(x, weight, bias, *self._geometry, ceiling, grid, tile=self.tile)
        return y


def find_kernel(x: Tensor, weight: Tensor, op: LinearMap, layer: IntegerAffine | None = None) -> ConvKernel | None:
    """Return the Triton kernel that is to run a layer, or None if torch's operators are to run it.

    A layer is run on float *values*, or with ``layer`` on integer *codes*. Kernels run only where `tritonq.backend`
    chooses Triton, never while ``torch.compile`` traces, and for up to 65535 groups. Besides:

    - Values: 2-d convolutions that pad with zeros, outside of autocast, if the GPU's table has a tile for them.
    - Codes of up to 8 bits: also 1-d convolutions, other padding, and matrix products, unless the table has
      ``"torch"``.

    Transposed and 3-d convolutions, and convolutions of an ``x`` without a batch axis, have no kernel.

    Args:
        x: the input, of which shape, strides, dtype and device are read.
        weight: the layer's weight, of which only the shape is read.
        op: the layer's convolution or matrix product, without weight and bias.
        layer: the integers that are convolved instead of values; None: values are.

    Raises:
        RuntimeError: :func:`~tritonq.use_backend` asks for a backend that can't run on ``x``.
    """
    if torch.compiler.is_compiling() or select(x) != "triton":
        return None
    if layer is None:
        conv = op.conv2d if x.dim() == 4 and not torch.is_autocast_enabled(x.device.type) else None
    else:
        conv = op.as_conv2d(x) if layer.has_8_bit_codes else None
    if conv is None or conv.groups > _MOST_GROUPS:
        return None
    tile = None
    if op.conv2d is not None:
        from tritonq.kernels.conv2d import tuned_tile
        from tritonq.kernels.conv_tile import ConvGeometry

        geometry = ConvGeometry(conv.stride, conv.padding, conv.dilation, conv.groups)
        tile = tuned_tile(x, weight, geometry, is_codes=layer is not None)
        if tile == "torch" or (tile is None and layer is None):
            return None
    return ConvKernel(op, conv, tile)


def run_integer_layer(
    x: Tensor, layer: IntegerAffine, op: LinearMap, output: Grid | None, kernel: ConvKernel | None
) -> Tensor:
    """Run a layer in exact integers, as eval mode and converted layers do; returns values in ``x``'s dtype.

    These are ``fl(Σ (x_code - x_zero) (w_code - w_zero) + bias) · multiplier``, or with ``output``, of scale s,
    ``round(fl(Σ … + bias) · fl(multiplier / s)) · s``; fl rounds to float32. ``output.qtype.rounding`` says how
    ``round`` treats ties.

    Args:
        x: float tensor of values on the layer's input grid.
        layer: the layer's weight and bias as integers, and its float32 multiplier, input scale times weight scale.
        op: the convolution or product, without weight and bias.
        output: the grid that the sums are rounded to, before clipping, per tensor; None: they stay unrounded.
        kernel: what :func:`find_kernel` returned for ``x``, ``op`` and ``layer``; None: torch's operators.
    """
    if kernel is not None:
        return kernel.integers(x, layer, output)
    return integer_affine(x, layer, op, op.output_axis, output).to(x.dtype)


class _FoldedConv2d(torch.autograd.Function):
    """``relu?(conv(x, weight) + bias)`` by kernel; the backward is torch's convolution, masked by the result."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kernel: ConvKernel, ceiling: float | None
    ) -> Tensor:
        y = kernel._run(x, weight, bias, ceiling, None)
        ctx.save_for_backward(x, weight, None if ceiling is None else y)
        ctx.conv, ctx.ceiling = kernel.conv, ceiling
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, y = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if y is not None:
            dy = rectify_backward(dy, y, ctx.ceiling)
        return *ctx.conv.backward(dy, x, weight, needs_x, needs_weight, needs_bias), None, None
