"""Layers in integers by the 8-bit kernels that torch has for x86 CPUs (oneDNN): the codes of `integer`, in less time.

oneDNN multiplies uint8 input codes by int8 weight codes and adds in int32. Its float32 result with scale 1 is
``float32(Σ + bias)``, with Σ the sum of ``(x_code - x_zero) · (w_code - w_zero)``; times input and weight scale it is
the layer's value. Rounding to the output's codes follows in `tritonq.reference.eval_codes`: oneDNN's own requantization
rounds after the scale and again after the bias, which moves codes near ties.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.backend import without_kernel
from tritonq.functional.coded_tensor import memory_format_of
from tritonq.functional.codes import code_range, give_codes, images_at_once, take_codes
from tritonq.functional.host_grid import HostGrid, host_grid
from tritonq.functional.integer import FLOAT32_EXACT, IntegerAffine
from tritonq.functional.linear_map import Convolution, LinearMap, MatrixProduct, PaddedConvolution
from tritonq.grid import Grid
from tritonq.reference.eval_codes import CodeRange, Factors, is_within, multiply_, repeated
from tritonq.reference.fake_quant import quantize

# ``(input codes, bias or None, whether a ReLU follows) -> float32 sums``.
_Sums = Callable[[Tensor, Tensor | None, bool], Tensor]

_LARGEST_INPUT_CODE = 255
_MAX_SUM = 2**31
# For how many sizes of inputs a layer keeps its weight in order.
_MAX_SIZES = 8
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """A layer prepared for torch's integer kernels: call it with the input's codes.

    The result is ``clip(round(fl(Σ + bias) · factor) + zero)``, uint8, with any ReLU applied; without output grid
    ``fl(Σ + bias) · factor``, float32. fl rounds to float32.

    Attributes:
        source: grid of the input.
        sums: the kernel: ``(input codes, bias or None, whether a ReLU follows) -> float32 sums``.
        bias: float32 (out,), in steps of input times weight scale, added by the kernel; None if there is none, or if
            it passes 2^24: then the results of ``parts`` are always taken.
        parts: kernels of parts of the weight, whose results add up to that of ``sums`` and are exact in float32. Empty
            if the result of ``sums`` is exact itself.
        exact_bias: int32 (out,), added to the results of ``parts``; or None.
        reach: if the magnitudes of all results of ``sums`` are below it, float32 rounded none of them; else ``parts``
            are run. None: float32 never rounds them.
        factors: float32, one per out channel or one for all; ``sums · factors`` are steps of the output's scale, or
            values if there is no output grid.
        output_grid: of the result; None: the result is float values.
        rectifies: whether a ReLU stands between the layer and ``output_grid``.
        code_range: the codes that steps become: zero, ends of the clip and ties. None if there is no output grid.
        sums_per_image: kept from earlier calls: input's shape without its first axis -> number of sums per image. With
            it a large batch is run in parts whose sums fit into the CPU's cache.
    """

    source: HostGrid
    sums: _Sums
    bias: Tensor | None
    parts: tuple[_Sums, ...]
    exact_bias: Tensor | None
    reach: float | None
    factors: Factors
    output_grid: HostGrid | None
    rectifies: bool
    code_range: CodeRange | None
    sums_per_image: dict[torch.Size, int] = field(default_factory=dict)

    def __call__(self, codes: Tensor) -> Tensor:
        """Return the output's codes, uint8 counted from 0; without output grid float32 values.

        Args:
            codes: uint8 codes of the input, counted from 0; not empty.
        """
        at_once = self._images_at_once(codes)
        if at_once == len(codes):
            return self._run(codes)
        return torch.cat([self._run(part) for part in torch.split(codes, at_once)])

    def _images_at_once(self, codes: Tensor) -> int:
        """Return how many images' sums fit into a cache; the whole batch if all do, or if the number is not known."""
        per_image = self.sums_per_image.get(codes.shape[1:], 0)
        return len(codes) if self.output_grid is None else images_at_once(per_image, len(codes))

    def _run(self, codes: Tensor) -> Tensor:
        total = self.sums(codes, self.bias, self.rectifies and not self.parts)
        if total.dim() > self.factors.by_channel.dim():  # else there is no axis of images
            if len(self.sums_per_image) == _MAX_SIZES:
                self.sums_per_image.clear()
            self.sums_per_image[codes.shape[1:]] = total.numel() // len(codes)
        if self.code_range is None:
            if self.reach is not None and not is_within(total, self.reach):
                total = self._exact_sums(codes)
            return multiply_(total, self.factors)
        computed: Any = without_kernel("eval_codes", total)
        result: Tensor | None = computed.codes_of_sums(total, self.factors, self.code_range, self.reach)
        if result is None:
            result = computed.codes_of_sums(self._exact_sums(codes), self.factors, self.code_range, None)
        return cast(Tensor, result)

    def _exact_sums(self, codes: Tensor) -> Tensor:
        total = self.parts[0](codes, None, False).double()
        for part in self.parts[1:]:
            total += part(codes, None, False)
        if self.exact_bias is not None:
            total += self.exact_bias.view(self.factors.by_channel.shape)
        return total.float()


def run_packed(x: Tensor, layer: PackedLayer) -> Tensor | None:
    """Round a tensor of values to the layer's input grid, ties to even, and run the layer on it.

    Codes that ``x`` carries on that grid are taken as they are. Return None if a value is NaN or rounds to no code of
    the grid, or if the tensor is empty.

    Args:
        x: a tensor that `codes.can_use_codes` accepts: float32 on the CPU, without need of a gradient.
        layer: the prepared layer.

    Returns:
        Clipped values on the output's grid, as `codes.give_codes` returns them: a tensor with its codes attached (in
        ``torch.inference_mode`` without), or, in a call of a converted model, a `CodedTensor`, which stores codes only
        until its values are read; `codes.carried_codes` reads the codes of both. Without output grid plain values
        ``fl(Σ + bias) · input scale · weight scale``, without ReLU. float32; channels_last if ``x`` is, else
        contiguous.
    """
    codes = take_codes(x, layer.source) if x.numel() else None
    if codes is None:
        return None
    result = layer(codes)
    if layer.output_grid is not None:
        return give_codes(result, layer.output_grid, x)
    return result.contiguous(memory_format=memory_format_of(x))


def pack(
    layer: IntegerAffine, op: LinearMap, source: Grid, output: Grid | None, ceiling: float | None
) -> PackedLayer | None:
    """Prepare a layer for torch's integer kernels; return None if they can't run it.

    They run convolutions of one to three dimensions (not transposed, padded with zeros) and matrix products on x86 CPUs
    whose 8-bit products don't saturate, with inputs and outputs of up to 256 codes, weight codes minus zero points in
    -128..127, at least one, finite scales, and sums that cannot reach 2^31 (``layer.sum_bound``, without bias); none
    while ``torch.backends.mkldnn.enabled`` is False.

    Args:
        layer: the layer's weight and bias as integers.
        op: its convolution or matrix product, without weight and bias.
        source: grid of the input, per tensor.
        output: grid of the quantizer behind the layer, per tensor; None: the layer gives float values.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.
            Without ``output`` the caller applies the ReLU.
    """
    weight = layer.weight
    if not weight.is_cpu or not has_integer_kernels() or not weight.numel():
        return None
    on_host, target = host_grid(source), None if output is None else host_grid(output)
    make = _kernel_of(op)
    if make is None or on_host is None or (output is not None and target is None):
        return None
    least, most = (float(bound) for bound in torch.aminmax(weight))
    steps = layer.multiplier if output is None else layer.multiplier / output.scale
    # NaN, of a training that diverged, fails each comparison.
    if not (least >= -128 and most <= 127 and layer.sum_bound < _MAX_SUM and bool(steps.isfinite().all())):
        return None
    # oneDNN reads a transposed matrix as if it lay in order.
    codes = weight.to(torch.int8).contiguous()
    zero, bias, exact = on_host.zero, layer.bias, layer.sum_bound < FLOAT32_EXACT
    if exact and zero and not _pads(op):
        sums = codes.flatten(1).sum(1, dtype=torch.int32)
        magnitudes = codes.flatten(1).abs().sum(1, dtype=torch.int32)
        if int(magnitudes.max()) * _LARGEST_INPUT_CODE < FLOAT32_EXACT:
            # Without a zero point the kernel is faster.
            bias, zero = (0 if bias is None else bias) - zero * sums, 0
    fits = bias is None or int(bias.abs().max()) <= FLOAT32_EXACT
    exact = exact and fits
    largest, rectifies, parts = None, False, () if exact else _parts(codes, layer, lambda part: make(part, zero))
    if output is not None and ceiling is not None:
        largest, rectifies = int(quantize(torch.tensor([ceiling]), output)) - output.qtype.quant_min, True
    # Kernels of a part have no ReLU.
    codes_after = None
    if target is not None:
        largest_sum = layer.sum_bound + (0.0 if layer.bias is None else float(layer.bias.abs().max()))
        low = target.zero if rectifies and parts else 0
        codes_after = code_range(target, low, largest, largest_sum * float(steps.abs().max()))
    return PackedLayer(
        source=on_host,
        sums=make(codes, zero),
        bias=None if bias is None or not fits else bias.float(),
        parts=parts,
        exact_bias=bias,
        reach=None if exact else _reach(bias),
        factors=repeated(steps.view(-1, *[1] * (-1 - op.output_axis))),
        output_grid=target,
        rectifies=rectifies,
        code_range=codes_after,
    )


def _parts(codes: Tensor, layer: IntegerAffine, make: Callable[[Tensor], _Sums]) -> tuple[_Sums, ...]:
    """Return kernels for parts of the weight, as many as it takes for float32 to round none of their sums.

    Args:
        codes: int8 weight codes.
        layer: the layer's integers, of which the bound of the sums is read.
        make: makes a kernel from weight codes.
    """
    rows = codes.flatten(1)
    sizes = rows.int().abs()
    largest_input = layer.sum_bound / max(1, int(sizes.sum(1).max()))
    count = 1
    while max(int(piece.sum(1).max()) for piece in sizes.tensor_split(count, 1)) * largest_input >= FLOAT32_EXACT - 1:
        count += 1
    made = []
    for columns in torch.arange(rows.shape[1]).tensor_split(count):
        part = torch.zeros_like(rows)
        part[:, columns] = rows[:, columns]
        made.append(make(part.view(codes.shape)))
    return tuple(made)


def _reach(bias: Tensor | None) -> float:
    """Return the bound below which a sum plus bias proves that float32 rounded neither: ``2^24 - 1 - max|bias|``.

    It is ``-inf``, which no sum stays below, if the bias (int32 (out,) or None) passes 2^24 itself.
    """
    largest = 0 if bias is None else int(bias.abs().max())
    # A larger bias is not the kernel's, so that its sums always lack it.
    return -math.inf if largest > FLOAT32_EXACT else FLOAT32_EXACT - 1 - largest


def _pads(op: LinearMap) -> bool:
    return isinstance(op, PaddedConvolution) or (isinstance(op, Convolution) and any(op.padding))


def _kernel_of(op: LinearMap) -> Callable[[Tensor, int], _Sums] | None:
    """Return a function ``(int8 weight codes, input zero point) -> kernel`` for a map; None if there is none."""
    if isinstance(op, MatrixProduct):
        return _product
    if isinstance(op, Convolution):
        return None if op.transposed else partial(_convolution, op)
    if isinstance(op, PaddedConvolution) and op.pad_mode == "constant" and not op.conv.transposed:
        return partial(_padded_convolution, op)
    return None


def _product(weight: Tensor, zero: int) -> _Sums:
    packed, scales, zeros = torch.ops.onednn.qlinear_prepack(weight, None), *_unit_scales(len(weight))
    run = torch.ops.onednn.qlinear_pointwise.default

    def sums(codes: Tensor, bias: Tensor | None, rectifies: bool) -> Tensor:
        after = "relu" if rectifies else "none"
        result: Tensor = run(
            codes.contiguous(), 1.0, zero, packed, scales, zeros, bias, 1.0, 0, torch.float32, after, [], ""
        )
        return result

    return sums


def _convolution(conv: Convolution, weight: Tensor, zero: int) -> _Sums:
    scales, zeros = _unit_scales(len(weight))
    geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    # By the input's sizes: oneDNN would put a weight that lies otherwise in order in each call, at ten times the cost.
    packed: dict[torch.Size, Tensor] = {}
    rank, run = len(conv.stride), _convolutions()[len(conv.stride)]

    def sums(codes: Tensor, bias: Tensor | None, rectifies: bool) -> Tensor:
        batch = codes if codes.dim() == rank + 2 else codes.unsqueeze(0)
        batch = batch.contiguous(memory_format=_FORMATS.get(batch.dim(), torch.contiguous_format))
        sizes = batch.shape[1:]
        if sizes not in packed:
            if len(packed) == _MAX_SIZES:
                packed.clear()
            packed[sizes] = torch.ops.onednn.qconv_prepack(weight, scales, 1.0, zero, *geometry, list(batch.shape))
        after = "relu" if rectifies and rank < 3 else "none"  # the kernel of three dimensions has no ReLU
        result: Tensor = run(
            batch, 1.0, zero, packed[sizes], scales, zeros, bias, *geometry, 1.0, 0, torch.float32, after, [], ""
        )
        if rectifies and rank == 3:
            result.relu_()
        return result if batch.dim() == codes.dim() else result.squeeze(0)

    return sums


def _padded_convolution(op: PaddedConvolution, weight: Tensor, zero: int) -> _Sums:
    inner = _convolution(op.conv, weight, zero)
    return lambda codes, bias, rectifies: inner(F.pad(codes, op.pad, value=zero), bias, rectifies)


@cache
def _convolutions() -> dict[int, Any]:
    ops = torch.ops.onednn
    return {1: ops.qconv1d_pointwise.default, 2: ops.qconv2d_pointwise.default, 3: ops.qconv3d_pointwise.default}


def _unit_scales(channels: int) -> tuple[Tensor, Tensor]:
    return torch.ones(channels), torch.zeros(channels, dtype=torch.int64)


def has_integer_kernels() -> bool:
    """Whether torch's 8-bit kernels run on this CPU with exact sums, and ``torch.backends.mkldnn.enabled`` is True.

    Sums are not exact on CPUs that add pairs of products in 16 bits, which saturate.
    """
    return bool(torch.backends.mkldnn.enabled) and _kernels_are_exact()


@cache
def _kernels_are_exact() -> bool:
    """Whether 8-bit products are added without saturating (x86 CPUs with VNNI, AMX or the like); tried once.

    Other CPUs add pairs of products in 16 bits, where 2 · 255 · 127 saturates.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    channels = 32
    dense, depthwise = torch.full((channels, channels, 3, 3), 127), torch.full((channels, 1, 3, 3), 127)
    plain = Convolution((1, 1), (1, 1), (1, 1), (0, 0), False, 1)
    cases: list[tuple[LinearMap, Tensor, tuple[int, ...]]] = [
        (plain, dense, (1, channels, 5, 5)),
        (replace(plain, padding=(0, 0)), dense[:, :, :1, :1], (1, channels, 5, 5)),
        (replace(plain, groups=channels), depthwise, (1, channels, 5, 5)),
        (MatrixProduct(), dense[:, :, 0, 0], (2, channels)),
    ]
    try:
        for op, weight, shape in cases:
            codes, make = torch.full(shape, 255, dtype=torch.uint8), cast(Any, _kernel_of(op))
            found = make(weight.to(torch.int8).contiguous(), 0)(codes, None, False)
            if not torch.equal(found, op(codes.float(), weight.float())):
                return False
    except (AttributeError, RuntimeError):  # a torch without these operators, or built without oneDNN
        return False
    return True
