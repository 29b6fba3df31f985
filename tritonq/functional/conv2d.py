"""Folded convolutions by kernel: of codes, and of values where this GPU's table says that it beats torch's convolution.

Torch has no convolution of codes for GPUs but that of float64, so that codes take the kernel where the table is silent.
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
    """The kernel for one layer, with what it was tuned to.

    Attributes:
        op: the layer's map.
        conv: the 2-d convolution that this is, made of what ``op.images`` gives.
        tile: a `tritonq.kernels.conv_tile.ConvTile`; None: the one of a launch that nobody tuned.
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
        """Return ``FQ(relu?(conv(x, weight) + bias))`` of a 2-d convolution, differentiable where ``grid`` is None.

        Args:
            x: (n, c, h, w).
            weight: (out, c/groups, kh, kw), quantized already.
            bias: (out,), or None.
            ceiling: of the ReLU; see :func:`tritonq.reference.activation.rectify`.
            grid: of the output.

        Raises:
            TypeError: three dtypes that are not one.

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
        """Compute :func:`tritonq.functional.integer.integer_affine` bit for bit, ReLU and fake quantization behind it.

        Args:
            x: on the layer's input grid.
            layer: the integers; see :func:`find_kernel` for which it takes.
            output: the grid that the result goes onto, or None.
            ceiling: of the ReLU; see :func:`tritonq.reference.activation.rectify`.
            grid: of the output.

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
    """Return the kernel that is to run this layer; None: torch's operators are.

    That is so where kernels don't run (`tritonq.backend`), where the GPU's table has ``"torch"`` for a convolution or,
    for values, no entry; under autocast of float values; while a graph is traced; for integers of more bits than
    float16 operands hold; and for more groups than a launch takes. Values take kernels in 2-d convolutions that pad
    with zeros alone; codes also in those of one dimension, in those that pad otherwise, and in matrix products.

    Args:
        x: the input.
        weight: its weight; shape alone matters.
        op: the layer's map.
        layer: the integers that are convolved instead of values, or None.
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
    """Run ``layer`` exactly, in ``x``'s dtype: the integer arithmetic of eval mode and of converted layers.

    Args:
        x: float tensor on the layer's input grid.
        layer: the integers.
        op: the convolution or product.
        output: the grid that the accumulator goes onto, or None.
        kernel: what :func:`find_kernel` found, or None: torch's operators.
    """
    if kernel is not None:
        return kernel.integers(x, layer, output)
    return integer_affine(x, layer, op, op.output_axis, output).to(x.dtype)


class _FoldedConv2d(torch.autograd.Function):
    """``relu?(conv(x, weight) + bias)``; backward by torch's convolution, ReLU's mask from its result."""

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
