"""Exact integer arithmetic for convolutions and matrix products: what eval, deployment and verification compute.

``y = (Σ (x_code - x_zero)(w_code - w_zero) + bias_code) * (input_scale * weight_scale)``. The sum is exact in integers,
whatever the order of its terms, so that a quantized model in training's eval mode and its deployed form agree bit for
bit. The integers are held in floating point: in float32 while no partial sum can reach 2^24, else in float64.

The *sums* (or accumulator) are the integers in brackets. If the output's grid is known, they are rounded to it in one
step, *requantized* as integer runtimes do it: ``round(sum * (multiplier / output_scale))``. Two roundings of a float32
product would move codes at ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tritonq.functional.direct import cpu_is_direct
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType
from tritonq.reference.conv2d import requantize
from tritonq.reference.fake_quant import quantize

# Convolution or product of an input and a weight, without bias; the out channel is axis `channel_axis` of the result.
LinearOp = Callable[[Tensor, Tensor], Tensor]

# What is stored, and what matrix units multiply exactly, has up to this many bits.
BYTE_BITS = 8
# No sum of integers below this is rounded in float32.
FLOAT32_EXACT = 2**24
# The largest bias code: float32 holds no integer between this and 2^31.
_MAX_BIAS_CODE = 2**31 - 128
# What bias and products may add up to: half of that is left for the rounding of the scale to float32.
_MAX_SUM = 2**31 - 512
# The same where a code has more than 8 bits and sums are held in 64 bits, which float64 can do up to 2^53.
_MAX_WIDE_SUM = 2**53 - 2**30


@dataclass(frozen=True)
class IntegerAffine:
    """A convolution or linear layer in integers: ``y = (op(x_code - x_zero, weight) + bias) · multiplier``.

    Attributes:
        weight: codes minus zero points, integer-valued, any dtype; shaped as the float weight.
        bias: int32, (out,), one step is ``multiplier``; or None.
        multiplier: float32 (out,): input scale times weight scale.
        input_scale: float32, one element.
        find_sum_bound: called without arguments, once, when :attr:`sum_bound` is first read; returns an upper bound of
            the magnitudes of all partial sums of products, without bias, or infinity if none is known.
        weight_scale: float32 (out,); with ``weight_zero_point`` what deployment stores.
        weight_zero_point: int32 (out,), already subtracted from ``weight``; None: all 0.
        has_8_bit_codes: whether input and weight both have codes of up to 8 bits.
        largest_product: upper bound of the magnitude of a product of input and weight codes (minus zero points), by
            their types.
    """

    weight: Tensor
    bias: Tensor | None
    multiplier: Tensor
    input_scale: Tensor
    find_sum_bound: Callable[[], float]
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    has_8_bit_codes: bool
    largest_product: int

    @property
    def sum_bound(self) -> float:
        """An upper bound of the magnitudes of all partial sums of products, without bias; infinite if not known.

        Its first reading may wait for a device.
        """
        # Before Python 3.12 `functools.cached_property` takes a lock, which torch.compile cannot trace.
        known = self.__dict__
        if "_sum_bound" not in known:
            known["_sum_bound"] = self.find_sum_bound()
        bound: float = known["_sum_bound"]
        return bound


def sum_bound(rows: Tensor, input_zero_point: Tensor, input_type: QuantizedType) -> float:
    """Return an upper bound of ``|Σ (x_code - x_zero) w|``: ``max over out channels of Σ|w| · max|x_code - x_zero|``.

    It waits for a GPU. Of an empty weight it is 0.

    Args:
        rows: w, the weight's codes minus zero points, (out, ...).
        input_zero_point: of the input, one element or one per channel, of which that with the largest codes counts.
        input_type: the range of the input's codes.
    """
    if rows.numel() == 0:
        return 0.0
    largest_input = _largest_code(input_zero_point, input_type).max()
    return float(rows.double().abs().flatten(1).sum(1).max() * largest_input)


def largest_product(*codes: tuple[QuantizedType, Tensor | None]) -> int:
    """Return an upper bound of the magnitude of a product of codes, one of each type, each minus its zero point.

    Zero points are not read: any code is taken to be possible.

    Args:
        *codes: for each factor its type and zero point; None for a zero point of 0.
    """
    largest = 1
    for qtype, zero_point in codes:
        low, high = qtype.quant_min, qtype.quant_max
        largest *= max(-low, high) if zero_point is None else high - low
    return largest


def _largest_code(zero_point: Tensor, qtype: QuantizedType) -> Tensor:
    """Return the largest magnitude of code minus zero point, float64, shaped as ``zero_point``."""
    zero = zero_point.double()
    return torch.maximum(zero - qtype.quant_min, qtype.quant_max - zero)


def centred_codes(x: Tensor, scale: Tensor) -> Tensor:
    """Return ``round(x / scale)``, the codes minus zero point of values that lie on a grid, as float32 integers.

    The result is exact for codes of up to 16 bits in float32, up to 8 bits in float16, and in bfloat16 up to 128 codes
    from the zero point, as symmetric 8-bit types are: each is then within half a code of its grid point. Farther out
    bfloat16 itself, whose numbers may lie almost two codes apart there, merges neighbours; the result is one of them.
    """
    return (x.float() / scale).round_()


class Rows(Protocol):
    """How a layer's weight is laid out: how its out channels get to axis 0, and back. A ``LinearMap`` knows it."""

    def to_rows(self, weight: Tensor) -> Tensor:
        """Return ``weight`` with its out channels on axis 0."""

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return rows in the layer's own layout: the inverse of :meth:`to_rows`."""


def to_integers(
    weight: Tensor, bias: Tensor | None, layout: Rows, source: Grid, grid: Grid, may_wait: bool = True
) -> IntegerAffine:
    """Return a layer in integers: the codes of its weight and bias on their grids, whose switches are not read.

    With scales s_in and s_w: weight codes are ``clip(round(w / s_w) + z) - z``, those of the bias ``round(bias / (s_in
    s_w))``. First s_w is raised in channels whose bias and sums together might not fit 32 bits. If codes of input or
    weight have more than 8 bits, the bias alone must fit 32 bits, and bias and sums together stay below 2^53. The
    result's ``weight_scale`` is the raised s_w; ``grid`` is not changed. ``input_scale`` and zero points share memory
    with the grids. Call it in ``torch.no_grad``.

    Args:
        weight: the float weight, with any BatchNorm folded in, as the layer lays it out.
        bias: float (out,), with any BatchNorm folded in; or None.
        layout: brings the weight's out channels to axis 0 and back.
        source: the input's grid, per tensor.
        grid: the weight's, per tensor or per out channel (axis 0 of the rows).
        may_wait: whether the result's ``sum_bound`` may be computed from the codes when it is read, which waits for a
            GPU; if not, it is infinity.
    """
    rows = layout.to_rows(weight.float())
    zero, qtype = _zero_point(grid).expand(len(rows)), grid.qtype
    scale = _raise_scale_for_sums(grid.scale.expand(len(rows)), zero, qtype, rows, bias, source)
    codes = quantize(rows, Grid(scale, zero, qtype.with_axis(0)))
    codes.sub_(zero.view(-1, *[1] * (codes.dim() - 1)))
    multiplier = source.scale * scale
    return IntegerAffine(
        weight=layout.from_rows(codes),
        bias=None if bias is None else bias_codes(bias, multiplier),
        multiplier=multiplier,
        input_scale=source.scale,
        find_sum_bound=partial(sum_bound, codes, _zero_point(source), source.qtype) if may_wait else lambda: math.inf,
        weight_scale=scale,
        weight_zero_point=zero,
        has_8_bit_codes=max(source.qtype.bits, qtype.bits) <= BYTE_BITS,
        largest_product=largest_product((source.qtype, source.zero_point), (qtype, grid.zero_point)),
    )


def integer_affine(
    x: Tensor, layer: IntegerAffine, op: LinearOp, channel_axis: int, output: Grid | None = None
) -> Tensor:
    """Run ``layer`` exactly on an input that lies on its input grid.

    Args:
        x: float tensor of values ``(code - zero_point) · input_scale``.
        layer: weight and bias as integers, and ``multiplier``, input scale times weight scale.
        op: the convolution or product; called with the input's and the weight's codes, both minus zero points.
        channel_axis: axis of the result with the out channels.
        output: the grid of the quantizer behind the layer, per tensor, or None. The caller applies a ReLU between them
            to the result, which stays on the grid. Ties are rounded as its type says.

    Returns:
        Without ``output``: float32 ``fl(sums + bias) · multiplier``, where fl rounds to float32 once. With it:
        ``round(fl(sums + bias) · fl(multiplier / s)) · s`` with the output's scale s, not yet clipped: the quantizer
        finds the codes of these values and clips them.

    Source: docs/integers.md, "Linear layers".
    """
    return onto_grid(integer_sums(x, layer, op), layer, channel_axis, output)


def integer_sums(x: Tensor, layer: IntegerAffine, op: LinearOp) -> Tensor:
    """Return ``Σ (x_code - x_zero) (w_code - w_zero)``, exact integers as float32 or float64.

    ``x`` are the input's values (not codes), ``layer`` the layer's integers, ``op`` its convolution or product, called
    as ``op(x_code - x_zero, layer.weight)``; the shape is that of ``op``'s result.
    """
    codes = centred_codes(x, layer.input_scale)
    # Autocast would round the sums to 8 or 11 bits.
    with torch.autocast(codes.device.type, enabled=False):
        if _is_direct(codes.device) and layer.sum_bound < FLOAT32_EXACT:
            return op(codes, layer.weight.float())
        # float64 also absorbs the fractions of Winograd and FFT algorithms: rounding restores the integers.
        return op(codes.double(), layer.weight.double()).round_()


def onto_grid(total: Tensor, layer: IntegerAffine, channel_axis: int, output: Grid | None) -> Tensor:
    """Return the float32 values of a layer from its integer sums: ``fl(total + bias) · multiplier``.

    With ``output`` they are ``round(fl(total + bias) · fl(multiplier / s)) · s`` with its scale s, not yet clipped;
    ties are rounded as its type says. fl rounds to float32 once, also where ``total`` is float64.

    Args:
        total: exact sums of products without bias, float32 or float64; may be overwritten.
        layer: gives bias codes and multiplier.
        channel_axis: axis of ``total`` with the out channels.
        output: the grid of the quantizer behind the layer, per tensor; None: values stay unrounded.
    """
    if output is None:
        return requantize(total, layer.bias, layer.multiplier, None, channel_axis)
    steps_per_code = layer.multiplier / output.scale
    return requantize(total, layer.bias, steps_per_code, output, channel_axis)


def _zero_point(grid: Grid) -> Tensor:
    return torch.zeros_like(grid.scale, dtype=torch.int32) if grid.zero_point is None else grid.zero_point


def _is_direct(device: torch.device) -> bool:
    """Whether float32 convolutions on this device are plain sums of products, without Winograd or FFT."""
    if device.type != "cpu":
        return False  # cuDNN may choose Winograd, which rounds
    if not torch.compiler.is_compiling():
        return cpu_is_direct()
    # No graph can hold the question.
    from tritonq.functional.traced import host

    return host.CPU_IS_DIRECT


def bias_codes(bias: Tensor, multiplier: Tensor) -> Tensor:
    """Return ``round(bias / multiplier)`` as int32, ties to even, in float64; clipped to ±(2^31 - 128).

    ``bias`` and ``multiplier`` (input scale times weight scale) are finite float tensors, (out,) or one element.
    """
    return bias_steps(bias, multiplier).to(torch.int32)


def bias_steps(bias: Tensor, multiplier: Tensor) -> Tensor:
    """Return the codes of :func:`bias_codes` as float64; NaN, which no integer stands for, stays NaN."""
    steps = (bias.double() / multiplier.double()).round().clamp(-_MAX_BIAS_CODE, _MAX_BIAS_CODE)
    return steps + 0.0  # a code has no -0


def _raise_scale_for_sums(
    scale: Tensor, zero_point: Tensor, qtype: QuantizedType, rows: Tensor, bias: Tensor | None, source: Grid
) -> Tensor:
    """Return the weight scale, raised in channels whose bias and sum of products together might pass 31 bits.

    With input scale s, n weights w and input codes up to c, such a channel's scale becomes
    ``(|b| / s + c Σ|w|) / (2^31 - 512 - n c / 2)``: rounding adds half a code to each weight at most. Products of codes
    of more than 8 bits are summed in 64 bits: the limit is then 2^53 - 2^30, and the bias alone must fit 31 bits.

    Args:
        scale: the weight's scales, (out,).
        zero_point: of the weight, (out,).
        qtype: codes of the weight.
        rows: the float weight w, (out, ...).
        bias: b, (out,), or None.
        source: the input's grid, per tensor.
    """
    is_wide = max(source.qtype.bits, qtype.bits) > BYTE_BITS
    if is_wide or rows[:1].numel() == 0:
        scale = raise_scale_for_bias(scale, bias, source.scale)
    if rows[:1].numel() == 0:
        return scale
    magnitudes = rows.detach().abs().flatten(1)
    largest = _largest_code(_zero_point(source), source.qtype)
    # A code is at most twice the weight over its scale as well, so that half the room is always enough for both.
    limit = _MAX_WIDE_SUM if is_wide else _MAX_SUM
    room = (limit - largest * (magnitudes.shape[1] / 2)).clamp(min=limit / 2)
    constant = 0.0 if bias is None else bias.detach().abs().double() / source.scale.double()
    clipped = torch.minimum(magnitudes, (scale * _largest_code(zero_point, qtype).float()).unsqueeze(1))
    fits = constant + largest * clipped.sum(1, dtype=torch.float64) <= room * scale.double()
    needed = (constant + largest * magnitudes.sum(1, dtype=torch.float64)) / room
    # One step up in float32, so that rounding cannot take the quotient back over the limit.
    raised = torch.nextafter(needed.float(), torch.full_like(needed, math.inf, dtype=torch.float32))
    return torch.where(fits, scale, raised.to(scale.dtype))


def raise_scale_for_bias(weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor) -> Tensor:
    """Return the weight scale, raised in channels whose bias would not fit 32 bits in steps of input × weight scale.

    It is at least ``|bias| / (input_scale · (2^31 - 128))``, rounded up in float32. Scales that are too small occur in
    dead channels (γ = 0); their weight codes only become smaller. Without bias the result is ``weight_scale`` itself,
    else a new tensor (out,).

    Args:
        weight_scale: float32 (out,).
        bias: (out,), with any BatchNorm folded in; or None.
        input_scale: one element.
    """
    if bias is None:
        return weight_scale
    needed = bias.detach().abs().double() / (input_scale.double() * _MAX_BIAS_CODE)
    # One step up in float32, so that rounding cannot take the quotient back over the limit.
    needed = torch.nextafter(needed.float(), needed.new_tensor(torch.inf, dtype=torch.float32))
    return torch.where(needed > weight_scale, needed, weight_scale)
