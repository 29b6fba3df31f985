"""Code-generation cases of the convolution-BatchNorm tail, the folded weight and the residual join."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tritonq.grid import Grid, RangeStatistics
from tritonq.kernels import conv_bn, residual, weight, weights_together
from tritonq.perf.codegen_cases import CodegenCase, meta
from tritonq.qparams import QINT8, QINT8_NARROW, QUINT8, QuantizedType
from tritonq.reference.conv_bn import BatchNormState, Normalization

# ResNet-50's second stage; rows of 56 * 56, which no tile divides.
_ACTIVATION = (256, 64, 56, 56)
# Of ReLU6: a plain ReLU compiles to less.
_CEILING = 6.0


def _vector(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return meta(channels, dtype=dtype)


def _state(qtype: QuantizedType, channels: int = 1) -> tuple[Grid, RangeStatistics]:
    shape = (channels,) if qtype.axis is not None else ()
    zero_point = None if qtype.fixed_zero_point == 0 else _vector(channels, torch.int32)
    return Grid(_vector(channels), zero_point, qtype, meta(1, dtype=torch.uint8)), RangeStatistics(
        torch.empty(shape, device="meta"),
        torch.empty(shape, device="meta"),
        torch.empty((), dtype=torch.int64, device="meta"),
        qtype.granularity,
        meta(1, dtype=torch.uint8),
        averaging_constant=0.01,
        eps=1e-7,
    )


def _forward(qtype: QuantizedType, channels_last: bool) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        c = meta(*_ACTIVATION, dtype=dtype, channels_last=channels_last)
        vector = _vector(c.shape[1])
        norm = BatchNormState(vector, vector, 0.1, 1e-5)
        return conv_bn.forward(c, vector, vector, vector, vector, norm, *_state(qtype), _CEILING)

    return call


def _backward(qtype: QuantizedType, channels_last: bool) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        c = meta(*_ACTIVATION, dtype=dtype, channels_last=channels_last)
        vector = _vector(c.shape[1])
        return conv_bn.backward(torch.empty_like(c), c, Normalization(*[vector] * 6), _state(qtype)[0], _CEILING)

    return call


def _weight(length: int, qtype: QuantizedType) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        rows = meta(512, length, dtype=dtype)
        return weight.quantize_folded(rows, _vector(512), *_state(qtype, 512))

    return call


def _weight_backward(length: int, qtype: QuantizedType) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        rows, (grid, _) = meta(512, length, dtype=dtype), _state(qtype, 512)
        per_row = grid.with_buffers(grid.scale, grid.zero_point, _vector(512, torch.uint8))
        return weight.folded_backward(rows, rows, _vector(512), _vector(512), per_row, True)

    return call


def _weights_together(qtype: QuantizedType) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        rows = [meta(512, 4608, dtype=dtype), meta(64, 9, dtype=dtype)]
        (one, one_range), (other, other_range) = _state(qtype, 512), _state(qtype, 64)
        return weights_together.quantize_all(rows, _vector(576), [one, other], [one_range, other_range])

    return call


def _join(dtype: torch.dtype) -> object:
    a = meta(*_ACTIVATION, dtype=dtype)
    return residual.forward(a, a, *_state(QINT8), _CEILING)


def _join_backward(dtype: torch.dtype) -> object:
    a = meta(*_ACTIVATION, dtype=dtype)
    return residual.backward(a, meta(a.numel() // 8, dtype=torch.uint8))


_LAYOUTS = (("channels first", False), ("channels last", True))
_GRIDS = (("int8", QINT8), ("uint8", QUINT8))

CASES: tuple[CodegenCase, ...] = (
    *(
        case
        for layout, last in _LAYOUTS
        for grid, qtype in _GRIDS
        for case in (
            CodegenCase(f"conv_bn/{layout} {grid}", _forward(qtype, last), "apply_kernel", 1, 1, "one read, one write"),
            CodegenCase(
                f"conv_bn_statistics/{layout} {grid}",
                _forward(qtype, last),
                "statistics_kernel",
                1,
                0,
                "one read, one write",
            ),
            CodegenCase(
                f"conv_bn_backward/{layout} {grid}",
                _backward(qtype, last),
                "gradient_kernel",
                2,
                1,
                "two reads, one write",
            ),
            CodegenCase(
                f"conv_bn_sums/{layout} {grid}",
                _backward(qtype, last),
                "gradient_sums_kernel",
                2,
                0,
                "two reads, one write",
            ),
        )
    ),
    CodegenCase("residual", _join, "join_kernel", 2, 1, "two reads, one write, two sums"),
    CodegenCase("residual_range", _join, "join_range_kernel", 2, 0, "one read, one write"),
    CodegenCase("residual_backward", _join_backward, "join_backward_kernel", 1, 1, "one read, one write"),
)
# Weights are float32 and small: these are checked for spills and wide accesses alone.
WEIGHTS = {
    "3x3": (_weight(4608, QINT8_NARROW.with_axis(0)), _weight_backward(4608, QINT8_NARROW.with_axis(0))),
    "1x1": (_weight(64, QINT8.with_axis(0)), _weight_backward(64, QINT8.with_axis(0))),
    "depthwise": (_weight(9, QINT8.with_axis(0)), _weight_backward(9, QINT8.with_axis(0))),
    "long": (_weight(18432, QUINT8.with_axis(0)), _weight_backward(18432, QUINT8.with_axis(0))),
    "together": (_weights_together(QUINT8.with_axis(0)),),
}
