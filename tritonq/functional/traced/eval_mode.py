"""The arithmetic of quantization-aware modules in eval mode for ``torch.compile``.

Eager code asks on the host whether grids are switched on and rest on data. These operators ask on the device and
compute both answers there, or one where looking is free; integers and what follows them are eager code's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor

from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.integer import Grid, OutputGrid, integer_add, integer_sums, onto_grid, to_integers
from tritonq.functional.linear_map import Convolution, LinearMap, MatrixProduct
from tritonq.functional.traced.text import laid_out_as, own, qtype_of, qtype_text
from tritonq.qparams import is_readable
from tritonq.reference.quantizer_state import QuantizerState

_BETWEEN = "; "


def affine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    op: LinearMap,
    channel_axis: int,
    source: QuantizerState,
    weights: QuantizerState,
    output: QuantizerState | None,
) -> Tensor:
    """``op(x, FQ_w(weight)) + bias``, in exact integers while input and weight have grids that are switched on.

    Args:
        x: on the grid of ``source``; any shape that ``op`` takes.
        weight: float, with any BatchNorm folded in.
        bias: (out,), or None.
        op: the convolution or product.
        channel_axis: axis of the result that out channels run along.
        source: grid of the input, per tensor.
        weights: quantizer of the weight.
        output: quantizer behind the layer, per tensor, to whose grid the integers go while it is switched on; or None.

    Returns:
        In ``x``'s dtype; without gradient.
    """
    tensors, text = _pack(source, weights, *([] if output is None else [output]))
    bias = None if bias is None else bias.detach()
    return _affine(x.detach(), weight.detach(), bias, tensors, text, op_text(op), channel_axis)  # type: ignore


def add(a: Tensor, b: Tensor, source_a: QuantizerState, source_b: QuantizerState, output: QuantizerState) -> Tensor:
    """``a + b``, as integer runtimes add while all three grids are switched on: :func:`integer_add`.

    Args:
        a: float tensor on the grid of ``source_a``.
        b: the same for ``source_b``; broadcasts against ``a``.
        source_a: grid of a summand, per tensor.
        source_b: the other's.
        output: quantizer behind the addition.

    Returns:
        In ``a``'s dtype; without gradient.
    """
    return _add(a.detach(), b.detach(), *_pack(source_a, source_b, output))  # type: ignore[no-any-return]


@torch.library.custom_op("tritonq::eval_affine", mutates_args=())
def _affine(
    x: Tensor, weight: Tensor, bias: Tensor | None, grids: list[Tensor], text: str, op: str, channel_axis: int
) -> Tensor:
    source, weights, *output = _unpack(grids, text)
    y = run_affine(x, weight, bias, op_of(op), channel_axis, source, weights, output[0] if output else None)
    return own(y, laid_out_as(x, y.shape), x)


@_affine.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, grids: list[Tensor], text: str, op: str, channel_axis: int
) -> Tensor:
    return laid_out_as(x, op_of(op)(x, weight.to(x.dtype)).shape)


@torch.library.custom_op("tritonq::eval_add", mutates_args=())
def _add(a: Tensor, b: Tensor, grids: list[Tensor], text: str) -> Tensor:
    y = run_add(a, b, *_unpack(grids, text))
    return own(y, laid_out_as(a, y.shape), a, b)


@_add.register_fake
def _(a: Tensor, b: Tensor, grids: list[Tensor], text: str) -> Tensor:
    return laid_out_as(a, (a + b).shape)


def run_affine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    op: LinearMap,
    channel_axis: int,
    source: QuantizerState,
    weights: QuantizerState,
    output: QuantizerState | None,
) -> Tensor:
    """What :func:`affine` does when it runs."""

    def values() -> Tensor:
        grid = (weights.qtype.quant_min, weights.qtype.quant_max, weights.qtype.axis, weights.qtype.rounding)
        rows = fake_quantize(op.to_rows(weight), weights.scale, weights.zero_point, *grid, active=weights.active)
        return op(x, op.from_rows(rows).to(x.dtype), None if bias is None else bias.to(x.dtype))

    def integers() -> Tensor:
        layer = to_integers(weight, bias, op, _grid(source), _grid(weights), may_wait=is_readable(x))
        total = integer_sums(x, layer, op)
        if output is None:
            return onto_grid(total, layer, channel_axis, None).to(x.dtype)
        grid = OutputGrid(output.scale, output.qtype.rounding)
        # Both may use the sums: where both are computed, off the CPU, the sums are float64, which nothing overwrites.
        return _chosen(
            output.active,
            lambda: onto_grid(total, layer, channel_axis, grid),
            lambda: onto_grid(total, layer, channel_axis, None),
        ).to(x.dtype)

    return _chosen(source.active * weights.active, integers, values)


def run_add(a: Tensor, b: Tensor, source_a: QuantizerState, source_b: QuantizerState, output: QuantizerState) -> Tensor:
    """What :func:`add` does when it runs."""
    grids = (_grid(source_a), _grid(source_b), _grid(output))
    return _chosen(
        source_a.active * source_b.active * output.active,
        lambda: integer_add(a, b, *grids).to(a.dtype),
        lambda: (a + b).to(a.dtype),
    )


def _chosen(switch: Tensor, on: Callable[[], Tensor], off: Callable[[], Tensor]) -> Tensor:
    """One of two results by a one-element tensor; both are computed where reading it would wait for a device."""
    if is_readable(switch):
        return on() if bool(switch) else off()
    return torch.where(switch.view(()) != 0, on(), off())


def _grid(state: QuantizerState) -> Grid:
    return Grid(state.scale, cast(Tensor, state.zero_point), state.qtype)


def _pack(*states: QuantizerState) -> tuple[list[Tensor], str]:
    """Scale, zero point and switch of each, and their types as text."""
    tensors = [tensor for state in states for tensor in (state.scale, cast(Tensor, state.zero_point), state.active)]
    return tensors, _BETWEEN.join([qtype_text(state.qtype) for state in states])


def _unpack(tensors: list[Tensor], text: str) -> list[QuantizerState]:
    """Inverse of :func:`_pack`."""
    scales, zeros, switches = tensors[0::3], tensors[1::3], tensors[2::3]
    return list(map(QuantizerState, scales, zeros, switches, map(qtype_of, text.split(_BETWEEN))))


def op_text(op: LinearMap) -> str:
    """A convolution or product as text."""
    if not isinstance(op, Convolution):
        return ""
    sizes = (op.stride, op.padding, op.dilation, op.output_padding, (int(op.transposed), op.groups))
    return _BETWEEN.join([" ".join([str(size) for size in each]) for each in sizes])


@cache
def op_of(text: str) -> LinearMap:
    """Inverse of :func:`op_text`."""
    if not text:
        return MatrixProduct()
    *sizes, (transposed, groups) = (tuple(map(int, each.split(" "))) for each in text.split(_BETWEEN))
    stride, padding, dilation, output_padding = sizes
    return Convolution(stride, padding, dilation, output_padding, bool(transposed), groups)
