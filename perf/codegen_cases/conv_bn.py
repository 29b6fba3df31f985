"""Code-generation cases of the tail of a convolution with BatchNorm."""

from __future__ import annotations

import torch

from tritonq.kernels import conv_bn
from tritonq.perf.codegen_case import Call, CodegenCase, meta, meta_grid, meta_range
from tritonq.quantized_type import QINT8, QUINT8, QuantizedType
from tritonq.reference.conv_bn import BatchNormState, Normalization

# ResNet-50's second stage; rows of 56 * 56, which no tile divides.
_ACTIVATION = (256, 64, 56, 56)
# Its fourth: rows of 14 * 14, whose starts are multiples of 4 elements alone.
_SHORT_ROWS = (256, 256, 14, 14)
# Its fifth: rows of 7 * 7, which begin anywhere, in planes that begin at multiples of 16.
_ODD_ROWS = (256, 512, 7, 7)
# Of ReLU6: a plain ReLU compiles to less.
_CEILING = 6.0


def forward_call(qtype: QuantizedType, channels_last: bool, shape: tuple[int, ...] = _ACTIVATION) -> Call:
    """Return a launch of the forward tail of a ReLU6, with its observer."""

    def call(dtype: torch.dtype) -> object:
        c = meta(*shape, dtype=dtype, channels_last=channels_last)
        vector = meta(c.shape[1])
        norm = BatchNormState(vector, vector, 0.1, 1e-5)
        return conv_bn.forward(c, vector, vector, vector, vector, norm, meta_grid(qtype), meta_range(qtype), _CEILING)

    return call


def backward_call(qtype: QuantizedType, channels_last: bool, shape: tuple[int, ...] = _ACTIVATION) -> Call:
    """Return a launch of the backward tail of a ReLU6."""

    def call(dtype: torch.dtype) -> object:
        c = meta(*shape, dtype=dtype, channels_last=channels_last)
        vector = meta(c.shape[1])
        return conv_bn.backward(torch.empty_like(c), c, Normalization(*[vector] * 6), meta_grid(qtype), _CEILING)

    return call


_LAYOUTS = (("channels first", False), ("channels last", True))
_GRIDS = (("int8", QINT8), ("uint8", QUINT8))

CASES = (
    *(
        case
        for layout, last in _LAYOUTS
        for grid, qtype in _GRIDS
        for case in (
            CodegenCase(
                f"conv_bn/{layout} {grid}", forward_call(qtype, last), "apply_kernel", 1, 1, "one read, one write"
            ),
            CodegenCase(
                f"conv_bn_statistics/{layout} {grid}",
                forward_call(qtype, last),
                "statistics_kernel",
                1,
                0,
                "one read, one write",
            ),
            CodegenCase(
                f"conv_bn_backward/{layout} {grid}",
                backward_call(qtype, last),
                "gradient_kernel",
                2,
                1,
                "two reads, one write",
            ),
            CodegenCase(
                f"conv_bn_sums/{layout} {grid}",
                backward_call(qtype, last),
                "gradient_sums_kernel",
                2,
                0,
                "two reads, one write",
            ),
        )
    ),
    *(
        CodegenCase(
            f"{name}/rows of {extent} x {extent}",
            make(QINT8, False, shape),
            kernel,
            reads,
            writes,
            f"{'two reads' if reads == 2 else 'one read'}, one write, {budget}",
            dtypes=(torch.bfloat16,),
            width=width,
        )
        for extent, shape, budget, width in (
            (14, _SHORT_ROWS, "short rows", 64),
            (7, _ODD_ROWS, "rows that begin anywhere", 128),
        )
        for name, make, kernel, reads, writes in (
            ("conv_bn", forward_call, "apply_kernel", 1, 1),
            ("conv_bn_statistics", forward_call, "statistics_kernel", 1, 0),
            ("conv_bn_backward", backward_call, "gradient_kernel", 2, 1),
            ("conv_bn_sums", backward_call, "gradient_sums_kernel", 2, 0),
        )
    ),
)
